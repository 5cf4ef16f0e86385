"""How the cost of ``srcr compress`` grows with width, depth and calibration length: seconds and peak memory.

    python benchmarks/scaling.py [--widths 256,512,1024] [--layers 2,4,8] [--samples 32,128,256]
        [--json out.json]

Random Llamas in bfloat16 with an FFN of four times the width; 25 % + 4 bits, rows of 256 random tokens. One
thing is varied at a time, from the middle of each list. Each run is a process of its own, from start to exit;
what starting alone takes (imports) is given first.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from memory import IMPORTS, MAKE, measured

LENGTH, VOCABULARY = 256, 8000


def middle(values: list[int]) -> int:
    """The value that stands while others vary."""
    return sorted(values)[len(values) // 2]


def compress(width: int, layers: int, samples: int, work: Path) -> dict[str, Any]:
    """One model, made, compressed and removed."""
    folder, data, out = work / "model", work / "ids.safetensors", work / "out"
    make = [sys.executable, str(MAKE), str(folder), "--layers", str(layers), "--width", str(width)]
    make += ["--ffn", str(4 * width), "--vocabulary", str(VOCABULARY), "--ids", str(data)]
    make += ["--samples", str(samples), "--seq-len", str(LENGTH)]
    subprocess.run(make, check=True, capture_output=True)
    command = [sys.executable, "-m", "srcr", "compress", str(folder), "-o", str(out)]
    command += ["--sparsity", "0.25", "--bits", "4", "--calibration", str(data)]
    command += ["--samples", str(samples), "--seq-len", str(LENGTH)]
    taken: dict[str, Any] = dict(measured(command))
    for path in (folder, out):
        shutil.rmtree(path)
    return {"width": width, "layers": layers, "tokens": samples * LENGTH, **taken}


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", default="256,512,1024")
    parser.add_argument("--layers", default="2,4,8")
    parser.add_argument("--samples", default="32,128,256")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    lists = [
        [int(n) for n in text.split(",")]
        for text in (options.widths, options.layers, options.samples)
    ]
    centre = [middle(values) for values in lists]
    points = []
    for place, values in enumerate(lists):
        for value in values:
            point = (*centre[:place], value, *centre[place + 1 :])
            if point not in points:
                points.append(point)
    imports: dict[str, Any] = dict(measured([sys.executable, "-c", IMPORTS]))
    rows = [imports]
    table = Table("width", "layers", "tokens", "seconds", "peak, MB")
    table.add_row(
        "imports", "", "", f"{imports['seconds']:.1f}", f"{imports['peak_bytes'] / 1e6:.0f}"
    )
    for point in points:
        with tempfile.TemporaryDirectory() as work:
            row = compress(*point, Path(work))
        rows.append(row)
        table.add_row(
            *(str(row[key]) for key in ("width", "layers", "tokens")),
            f"{row['seconds']:.1f}", f"{row['peak_bytes'] / 1e6:.0f}",
        )  # fmt: skip
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    Console().print(table)


if __name__ == "__main__":
    main()
