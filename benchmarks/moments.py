"""The products that moments are made of, beside the same in float32 and as torch gives them in bfloat16.

    python benchmarks/moments.py [--tokens 8192] [--widths 512,2048,3072] [--json out.json]

Seconds of ``X^T X`` on and below the diagonal (bfloat16 inputs, sums in float32) and of ``X^T Y``: compiled,
by MKL, and converted to float32 first; and, of no use for moments, by torch, all of it rounded to bfloat16.
Medians.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from srcr.numerics import moments
from srcr.numerics.kernels import cpu_moments, mkl_moments
from sweep import seconds


def measured(width: int, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of every way, of inputs of one width."""
    X = torch.randn(args.tokens, width).bfloat16()
    Y = torch.randn(args.tokens, width // 4).bfloat16()
    gram, cross = torch.zeros(width, width), torch.zeros(width, width // 4)
    ways: dict[str, Callable[[], object]] = {
        "gram VDPBF16PS": lambda: cpu_moments.accumulate_gram(gram, X),
        "gram MKL": lambda: mkl_moments.accumulate_gram(gram, X),
        "gram float32": lambda: moments.accumulate_gram(gram, X.float()),
        "cross VDPBF16PS": lambda: cpu_moments.accumulate(cross, X, Y),
        "cross MKL": lambda: mkl_moments.accumulate(cross, X, Y),
        "cross float32": lambda: moments.accumulate(cross, X.float(), Y.float()),
        "full bfloat16": lambda: X.T @ X,
    }
    row: dict[str, float] = {"width": width}
    for name, way in ways.items():
        way()  # compiled, or its memory taken, the first time
        row[name] = seconds(way, args.repeats, X.device)
    return row


def main() -> None:
    """Time every width, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--widths", default="512,2048,3072")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not (cpu_moments.available() and mkl_moments.available()):
        raise SystemExit(
            "this CPU has no AVX-512 BF16, or torch no MKL: there is nothing to compare"
        )
    torch.set_num_threads(args.threads)
    rows = [measured(width, args) for width in map(int, args.widths.split(","))]
    table = Table(title=f"moments of {args.tokens} tokens, ms")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(str(row["width"]), *(f"{1e3 * row[k]:.1f}" for k in list(row)[1:]))
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
