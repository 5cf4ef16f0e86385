"""What it costs to begin: CPU seconds of commands that compute nothing, and of compiling the kernels.

    python benchmarks/startup.py [--source DIR ...] [--repeats 4] [--help-only]

Each source is the ``src`` folder of a version of srcr (without any: this one's), run by this interpreter in
turn with the others; of the repeats the least counts. The kernels are compiled into an empty cache, by a
small layer that is pruned and quantized; what the same layer takes with them is taken off. A program of one
command by typer, which srcr's command line is built on, stands beside ``--help``, which ``--help-only``
measures alone. Prints a Markdown table.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

COMMANDS = {
    "--help": ["--help"],
    "methods": ["methods"],
    "report of a small run": ["report", "RUN"],
}
SMALL = [
    "compress",
    "bundled",
    "-o",
    "RUN",
    "--calibration",
    "bundled",
    "--samples",
    "8",
    "--seq-len",
    "64",
]
PROGRAM = """
import typer
app = typer.Typer(rich_markup_mode=None)
@app.command()
def run(number: int = 1):
    "Does nothing."
app()
"""
LAYER = """
import torch
from srcr.numerics.hessian import LayerStatistics
from srcr.plans.plan import LayerPlan
from srcr.plans.specs import PruneSpec, QuantSpec, SolverSpec
from srcr.solver.problem import LayerProblem
from srcr.solver.solve import solve
torch.manual_seed(0)
W, X = torch.randn(64, 64), torch.randn(256, 64)
plan = LayerPlan("a", PruneSpec(sparsity=0.25), QuantSpec(num_bits=4, group_size=32))
statistics = LayerStatistics(X.T @ X)
solve(LayerProblem({"a": W}, {"a": plan}, statistics, SolverSpec(), torch.float32))
"""


def cpu_seconds(arguments: list[str], source: Path, folder: Path, cache: Path) -> float:
    """CPU seconds of this interpreter with a source's srcr, in a folder, with a cache of kernels."""
    variables = {"PYTHONPATH": str(source), "NUMBA_CACHE_DIR": str(cache)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | variables,
        check=True,
        capture_output=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Run everything in turn, print the least of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, action="append", help="a src folder")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--help-only", action="store_true")
    options = parser.parse_args()
    sources = [path.resolve() for path in options.source or [Path(__file__).parents[1] / "src"]]
    rows: dict[str, list[list[float]]] = {}

    def note(row: str, number: int, seconds: float) -> None:
        rows.setdefault(row, [[] for _ in sources])[number].append(seconds)

    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(number) for number in range(len(sources))]
        for source, folder in zip(sources, folders, strict=True):
            folder.mkdir()
            if not options.help_only:
                cpu_seconds(["-m", "srcr", *SMALL], source, folder, folder / "cache")
        for repeat in range(options.repeats):
            for number, (source, folder) in enumerate(zip(sources, folders, strict=True)):
                place = (source, folder, folder / "cache")
                if options.help_only:
                    note("`srcr --help`", number, cpu_seconds(["-m", "srcr", "--help"], *place))
                    seconds = cpu_seconds(["-c", PROGRAM, "--help"], *place)
                    note("`--help` of a program of one command by typer", number, seconds)
                    continue
                for row, words in COMMANDS.items():
                    more = ["--overwrite"] if words[0] == "report" else []
                    seconds = cpu_seconds(["-m", "srcr", *words, *more], *place)
                    note(f"`srcr {row}`", number, seconds)
                cache = folder / f"empty {repeat}"
                first = cpu_seconds(["-c", LAYER], source, folder, cache)
                note(
                    "compiling the kernels",
                    number,
                    first - cpu_seconds(["-c", LAYER], source, folder, cache),
                )
    names = [f"source {number + 1}" for number in range(len(sources))]
    print(f"| CPU seconds | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|", sep="\n")
    for row, taken in rows.items():
        print(f"| {row} | {' | '.join(f'{min(each):.2f}' for each in taken)} |")


if __name__ == "__main__":
    main()
