"""Time and peak memory of ``srcr compress`` of this working tree against another commit's.

    python benchmarks/same_cost.py [--reference cb60a6f] [--repeats 5] [--models 5M,40M] [--json FILE]

Random Llamas in bfloat16 of 5 and 40 million parameters, on 128 x 256 random tokens, 25 % + 4 bits; in
``40M self`` the model writes its calibration data. Each run is a process of its own, the two trees in turn;
medians, and the median of the ratios of neighbouring runs.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from same_bytes import checkout

ROOT = Path(__file__).parents[1]
MAKE = Path(__file__).with_name("random_llama.py")
SIZES = {"5M": "4x256x768x8000", "40M": "8x512x2048x16000"}
NAMES = ("layers", "width", "ffn", "vocabulary")


def make(work: Path, size: str) -> tuple[Path, Path]:
    """(model, token ids), made where they are missing."""
    folder, ids = work / size, work / f"{size}.safetensors"
    if not ids.exists():
        command = [sys.executable, str(MAKE), str(folder), "--ids", str(ids)]
        for name, value in zip(NAMES, SIZES[size].split("x"), strict=True):
            command += [f"--{name}", value]
        subprocess.run(command, check=True)
    return folder, ids


def measured(tree: Path, arguments: list[str]) -> dict[str, float]:
    """Seconds, CPU seconds and peak bytes of a command under a tree.

    Raises:
        SystemExit: it fails.
    """
    environment = {"PYTHONPATH": str(tree / "src"), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "2"}
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "srcr", *arguments], env=environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    message = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(message.decode()[-2000:])
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak": usage.ru_maxrss * 1024.0,
    }


def main() -> None:
    """Measure in turn, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", default="cb60a6f")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models", default="5M,40M,40M self")
    parser.add_argument("--work", type=Path, default=Path("build/same_cost"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    table = Table("", "", "seconds", "CPU seconds", "peak, MB")
    with tempfile.TemporaryDirectory() as work:
        trees = {"before": checkout(options.reference, Path(work) / "tree"), "now": ROOT}
        for model in options.models.split(","):
            folder, ids = make(options.work, model.split()[0])
            out = Path(work) / "out"
            source = "self" if model.endswith("self") else str(ids)
            arguments = [
                "compress",
                str(folder),
                "-o",
                str(out),
                "--sparsity",
                "0.25",
                "--bits",
                "4",
            ]
            arguments += ["--calibration", source, "--samples", "128", "--seq-len", "256"]
            runs: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
            for repeat in range(options.repeats + 1):
                order = list(trees.items()) if repeat % 2 else list(reversed(trees.items()))
                for name, tree in order:
                    runs[name].append(measured(tree, arguments))
                    shutil.rmtree(out)
            runs = {name: each[1:] for name, each in runs.items()}  # the first fills caches
            results[model] = runs
            for name, each in runs.items():
                row = {key: median(run[key] for run in each) for key in each[0]}
                cells = (f"{row['seconds']:.2f}", f"{row['cpu']:.2f}", f"{row['peak'] / 1e6:.0f}")
                table.add_row(model, name, *cells)
            pairs = list(zip(runs["before"], runs["now"], strict=True))
            keys = ("seconds", "cpu", "peak")
            ratios = [median(now[key] / before[key] for before, now in pairs) for key in keys]
            table.add_row(
                model, "now / before", *(f"{ratio:.3f}" for ratio in ratios), style="bold"
            )
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
