"""The sweep alone, at the shapes of Llama-3.1-8B's layers: reference, compiled, and what cannot be avoided.

    python benchmarks/sweep.py [--shapes 4096x4096,14336x4096,4096x14336] [--repeats 3] [--json out.json]

It runs on the GPU if there is one (Triton), else on the CPU (Numba). Unavoidable are the matrix products
that carry a block's errors to the columns behind it (the trailing updates); they are timed alone, in the
same run. The roofline is the time that the arithmetic or the bytes of the whole would take, whichever is
longer, at the speeds of a large float32 product and of a copy, both measured in the same run. The factor is
made up (the sweep's time does not depend on it) and the grid is fitted beforehand: factorisation and scale
search are not in these times. Descent is one pass, against the products that it cannot avoid. The reference
is timed once a shape.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from srcr.methods import get_pruner
from srcr.numerics import masks, obs
from srcr.numerics.cholesky import CholeskyFactor
from srcr.numerics.descent import Descent, refine, step_columns
from srcr.numerics.grid import Grid, GridSpec
from srcr.numerics.hessian import DampedHessian
from srcr.numerics.kernels.dispatch import kernels_for
from srcr.numerics.scales import fit_grid

BLOCK = 128


def made_up(cols: int, device: torch.device) -> CholeskyFactor:
    """An upper triangular factor like that of weakly correlated inputs."""
    upper = torch.randn(cols, cols, device=device).triu_(1) / (4 * cols**0.5)
    upper.diagonal().fill_(1.0)
    return CholeskyFactor(
        upper, torch.randperm(cols, device=device), torch.ones(cols, device=device), 0.01, 0.01
    )


def joint(factor: CholeskyFactor, grid: Grid) -> obs.MaskSelection:
    """25 % by SparseGPT's scores, block by block, against what rounding would cost."""
    pivots, scores = factor.upper.diagonal(), get_pruner("sparsegpt").scores

    def select(W: Tensor, at: slice) -> Tensor:
        W, column = W.contiguous(), grid.columns(factor.order[at])
        rounded = column.dequantize(column.quantize(W))
        costs = scores(W, factor.diagonal[at], pivots[at], rounded)
        return masks.prune_lowest(costs, W.numel() // 4)

    return obs.MaskSelection(select, BLOCK)


def trailing(work: Tensor, upper: Tensor) -> None:
    """The products that carry errors from block to block, and nothing else."""
    cols = work.shape[1]
    errors = torch.full((work.shape[0], BLOCK), 1e-3, device=work.device)
    for start in range(0, cols, BLOCK):
        stop = min(start + BLOCK, cols)
        work[:, stop:].addmm_(errors[:, : stop - start], upper[start:stop, stop:], alpha=-1)


def peaks(device: torch.device, repeats: int) -> tuple[float, float]:
    """Floating-point operations a second of a large product in float32, bytes a second of a copy."""
    n = 8192 if device.type == "cuda" else 2048
    a, b, out = (torch.randn(n, n, device=device) for _ in range(3))
    torch.mm(a, b, out=out)  # the first call of a library is not the peak
    flops = 2 * n**3 / seconds(lambda: torch.mm(a, b, out=out), repeats, device)
    return flops, 8 * n**2 / seconds(lambda: out.copy_(a), repeats, device)


def roofline(rows: int, cols: int, products: int, flops: float, bandwidth: float) -> float:
    """The least time of a sweep (``products`` 0) or of a pass of descent (1: it starts with a product).

    Every column's error reaches every column behind it: a product and a sum for each pair and row. The
    weight is read and written once in float32, its codes and mask once; of the factor half is read.
    """
    operations = rows * cols * (cols - 1) + products * 2 * rows * cols**2
    moved = rows * cols * (4 + 4 + 1 + 1) + 4 * cols**2 * (products + 0.5)
    return max(operations / flops, moved / bandwidth)


def seconds(function: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """The median time of a call."""
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return median(times)


def measure(rows: int, cols: int, options: argparse.Namespace) -> dict[str, Any]:
    """All times of one shape, in seconds."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    W = torch.randn(rows, cols, device=device)
    factor = made_up(cols, device)
    spec = GridSpec(4, cols, True, torch.bfloat16)
    grid = fit_grid(W, spec, shrinks=())
    kernels = kernels_for(device)
    ways: dict[str, tuple[Any, Any]] = {"reference": (obs.fix_columns, step_columns)}
    if kernels:
        ways["compiled"] = (kernels.fix_columns, kernels.step_columns)
    damped = DampedHessian(factor.upper.T @ factor.upper, 0.01)
    times: dict[str, Any] = {"rows": rows, "cols": cols}
    fastest = peaks(device, options.repeats)
    times["roofline, sweep"] = roofline(rows, cols, 0, *fastest)
    times["roofline, descent"] = roofline(rows, cols, 1, *fastest)
    work = W.clone()
    times["trailing updates"] = seconds(
        lambda: trailing(work, factor.upper), options.repeats, device
    )
    for name, (fix, step) in ways.items():
        if name == "reference" and options.skip_reference:
            continue
        repeats = 1 if name == "reference" else options.repeats
        if name == "compiled":  # compile first
            few = W[:16]  # Triton compiles anew for a number of rows that 16 does not divide
            small = fit_grid(few, spec, shrinks=())
            swept = obs.sweep(few, factor, joint(factor, small), small, BLOCK, fix)
            refine(swept, few, damped, small, Descent(1, BLOCK), step)
            swept = obs.sweep(few, factor, None, small, BLOCK, fix)
            refine(swept, few, damped, small, Descent(1, BLOCK), step)
        for what, selection in (("quantize", None), ("joint", joint(factor, grid))):
            times[f"{name}, {what}"] = seconds(
                lambda s=selection, f=fix: obs.sweep(W, factor, s, grid, BLOCK, f), repeats, device
            )
        swept = obs.sweep(W, factor, None, grid, BLOCK, kernels.fix_columns if kernels else fix)
        times[f"{name}, descent"] = seconds(
            lambda p=step, s=swept: refine(s, W, damped, grid, Descent(1, BLOCK), p),
            repeats,
            device,
        )
    return times


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="4096x4096,14336x4096,4096x14336", help="ROWSxCOLS,...")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--skip-reference", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    for shape in options.shapes.split(","):
        rows, cols = map(int, shape.split("x"))
        row = measure(rows, cols, options)
        results.append(row)
        unit = row["trailing updates"]
        table = Table("", "seconds", "of the trailing updates", title=f"{rows} x {cols}")
        for key, value in row.items():
            if key not in ("rows", "cols"):
                table.add_row(key, f"{value:.4g}", f"{value / unit:.2f}")
        Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
