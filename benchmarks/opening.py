"""What opening a checkpoint costs before the first block: this working tree against another commit.

    python benchmarks/opening.py [--reference cb60a6f] [--layers 16] [--repeats 3] [--work DIR] [--json FILE]

Each run is a process of its own on a random Llama in bfloat16 (by default about 2 GB), its files in the page
cache. Opening is all that ``srcr compress`` does with the model before it calibrates: config, topology, the
check that it is its blocks in a row, the check that every number is finite, and the hash. Imports are not in
it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from same_bytes import checkout

ROOT = Path(__file__).parents[1]
MAKE = Path(__file__).with_name("random_llama.py")
#: Prints what opening the folder that is named takes, by the functions of each tree.
MEASURE = """
import json, resource, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
{imports}
def taken():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), usage.ru_utime + usage.ru_stime
before = taken()
{opening}
after = taken()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({{"seconds": after[0] - before[0], "cpu": after[1] - before[1], "peak": peak}}))
"""
TREES = {
    "before": MEASURE.format(
        imports="import torch, transformers.models.llama.modeling_llama\n"
        "from srcr.models.load import sha256, weight_files\nfrom srcr.models.weights import open_weights",
        opening="source = open_weights(folder, torch.device('cpu'))\nsha256(weight_files(folder))",
    ),
    "now": MEASURE.format(
        imports="import torch, transformers.models.llama.modeling_llama\n"
        "from srcr.models.checkpoint import open_model",
        opening="opened = open_model(folder)\nopened.topology, opened.sha256",
    ),
}


def measured(tree: Path, program: str, folder: Path) -> dict[str, float]:
    """Seconds, CPU seconds and peak bytes of a process."""
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(tree / "src"), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Make the model where it is missing, open it in turn by both trees, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", default="cb60a6f")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("build/opening"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = options.work / f"llama-{options.layers}"
    if not (folder / "config.json").exists():
        make = [sys.executable, str(MAKE), str(folder), "--layers", str(options.layers)]
        make += ["--width", "2048", "--ffn", "8192", "--vocabulary", "32000"]
        subprocess.run(make, check=True)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in TREES}
    with tempfile.TemporaryDirectory() as work:
        trees = {"before": checkout(options.reference, Path(work)), "now": ROOT}
        for _ in range(options.repeats):
            for name, program in TREES.items():
                runs[name].append(measured(trees[name], program, folder))
    rows: dict[str, Any] = {
        name: {key: median(run[key] for run in results) for key in results[0]}
        for name, results in runs.items()
    }
    table = Table("", "seconds", "CPU seconds", "peak, MB", title=f"opening {size / 1e9:.2f} GB")
    for name, row in rows.items():
        cells = f"{row['seconds']:.2f}", f"{row['cpu']:.2f}", f"{row['peak'] / 1e6:.0f}"
        table.add_row(name, *cells)
    ratios = (f"{rows['now'][key] / rows['before'][key]:.2f}" for key in ("seconds", "cpu", "peak"))
    table.add_row("now / before", *ratios, style="bold")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
