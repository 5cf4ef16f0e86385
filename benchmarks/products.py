"""Float32 products as srcr takes them, beside ``A @ B``.

    python benchmarks/products.py [--shapes 768x256x256,2048x2048x2048] [--json out.json]

Milliseconds of ``[m, k] @ [k, n]``, medians, and how many times faster the first is. "part": the second one
is a part of a wider one, so that one way copies it and the other does not.
"""

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from srcr.numerics.products import product
from sweep import seconds

SHAPES = "256x256x256,768x256x256,512x2048x2048,2048x2048x2048,512x8192x8192"


def measured(shape: str, args: argparse.Namespace) -> dict[str, float | str]:
    """Seconds of both ways for one shape."""
    m, k, n = map(int, shape.split("x"))
    A, B, wide = torch.randn(m, k), torch.randn(k, n), torch.randn(k, n + 64)[:, :n]
    row: dict[str, float | str] = {"shape": shape}
    for name, right in (("whole", B), ("part", wide)):
        ways = {
            f"{name}, srcr": lambda b=right: product(A, b),
            f"{name}, A @ B": lambda b=right: A @ b,
        }
        for way, run in ways.items():
            run()
            row[way] = seconds(run, args.repeats, A.device)
    return row


def main() -> None:
    """Time every shape, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [measured(shape, args) for shape in args.shapes.split(",")]
    table = Table("m x k x n", "whole, ms", "A @ B", "times", "part, ms", "A @ B", "times")
    for row in rows:
        cells = [str(row["shape"])]
        for name in ("whole", "part"):
            ours, plain = float(row[f"{name}, srcr"]), float(row[f"{name}, A @ B"])
            cells += [f"{1e3 * ours:.2f}", f"{1e3 * plain:.2f}", f"{plain / ours:.2f}"]
        table.add_row(*cells)
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
