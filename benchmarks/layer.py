"""One decoder layer's linears, compressed from their statistics on: CPU time, and what it goes into.

    python benchmarks/layer.py [--shapes 3072x2048,2048x2048,16384x2048,2048x8192] [--group-size -1]

The default shapes are those of a model of 1B parameters: q/k/v, o, gate/up (stacked, as they share an
input) and down. Weights and inputs are made up: correlated, of very different sizes, the compressed model's
a little off the dense one's. CPU time of all threads, not seconds by the clock: it bears other work on the
machine better. The moments themselves and the model's forward passes are not in it.
"""

import argparse
import cProfile
import json
import pstats
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from srcr.numerics.hessian import LayerStatistics
from srcr.plans.plan import LayerPlan
from srcr.plans.specs import PruneSpec, QuantSpec, SolverSpec
from srcr.solver.problem import LayerProblem
from srcr.solver.solve import solve

#: Functions whose time is shown, with all that they call.
PARTS = (
    "factorize", "dense_target_", "fit_grid", "sweep", "select", "polish_", "_refine_block",
    "_refit_group", "_refit_rows", "output_energy", "_split",
)  # fmt: skip


def made_up(rows: int, cols: int, tokens: int) -> tuple[dict[str, torch.Tensor], LayerStatistics]:
    """A weight and the moments of its inputs."""
    torch.manual_seed(0)
    sizes = torch.randn(cols).mul_(0.7).exp_()
    base = torch.randn(tokens, cols // 4) @ torch.randn(cols // 4, cols) / (cols // 4) ** 0.5
    dense = (base + torch.randn(tokens, cols)) * sizes
    X = dense + 0.05 * torch.randn(tokens, cols) * sizes
    W = torch.randn(rows, cols) / cols**0.5
    return {"w": W}, LayerStatistics(X.T @ X, {"w": W @ dense.T @ X})


def measure(rows: int, cols: int, options: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds of one shape: in all, and of the parts."""
    weights, statistics = made_up(rows, cols, options.tokens)
    prune = PruneSpec(sparsity=options.sparsity) if options.sparsity else None
    quant = QuantSpec(num_bits=options.bits, group_size=options.group_size)
    plans = {"w": LayerPlan("w", prune, quant)}
    profile = cProfile.Profile(time.process_time)
    began = time.process_time()
    profile.enable()
    problem = LayerProblem(weights, plans, statistics, SolverSpec(), torch.bfloat16)
    solution = solve(problem)
    profile.disable()
    total = time.process_time() - began
    calls = pstats.Stats(profile)
    parts: dict[str, float] = {}
    for (file, _, name), (_, _, _, cumulative, _) in calls.stats.items():  # type: ignore[attr-defined]
        if "srcr" in file and name in PARTS:
            parts[name] = parts.get(name, 0.0) + cumulative
    return {"rows": rows, "cols": cols, "cpu": total, "error": solution["w"].error, **parts}


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="3072x2048,2048x2048,16384x2048,2048x8192")
    parser.add_argument("--sparsity", type=float, default=0.25)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
    warm = argparse.Namespace(**{**vars(options), "tokens": 512})
    measure(8, 256, warm)  # compile first
    results = [measure(rows, cols, options) for rows, cols in shapes]
    table = Table("", *(f"{rows} x {cols}" for rows, cols in shapes), "all")
    for key in ("cpu", *PARTS):
        row = [result.get(key, 0.0) for result in results]
        table.add_row(key, *(f"{value:.2f}" for value in (*row, sum(row))))
    table.add_row("output error", *(f"{result['error']:.6f}" for result in results), "")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
