"""How often 95 % intervals hold the truth, where it is known.

    python benchmarks/intervals.py [--repeats 1000]

Each row draws so many made-up measurements, and counts those whose interval holds the true value: ratios over
64 documents of unequal length with lognormal losses (skewness 1.8 and 3.7), and paired differences of 300
items, 70 % right by the base and 65 % by the compressed model, which mostly agree. A row outside 93 to 97 %
is a failure (exit code 1).
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
from rich.console import Console
from rich.table import Table

from srcr.metrics.intervals import interval, ratio_interval
from srcr.records.estimate import Estimate

LOWEST, HIGHEST = 0.93, 0.97


def ratio(rng: np.random.Generator, sigma: float) -> Estimate:
    """The interval of a ratio whose true value is exp(sigma^2 / 2)."""
    tokens = rng.integers(50, 500, size=64).astype(float)
    loss = np.exp(sigma * rng.standard_normal(64))
    return ratio_interval(tokens * loss, tokens)


def difference(rng: np.random.Generator) -> Estimate:
    """The interval of a paired difference whose true value is -0.05."""
    luck = rng.random(300)
    base = luck < 0.7
    ours = np.where(rng.random(300) < 0.8, luck, rng.random(300)) < 0.65
    change = ours.astype(float) - base
    return interval(lambda draw: change[draw].mean(-1), 300)


def coverage(
    draw: Callable[[np.random.Generator], Estimate], truth: float, repeats: int, seed: int
) -> float:
    """The share of intervals that hold the truth."""
    rng = np.random.default_rng(seed)
    inside = [each.low <= truth <= each.high for each in (draw(rng) for _ in range(repeats))]
    return float(np.mean(inside))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=1000)
    repeats = parser.parse_args().repeats
    rows = {
        f"ratio, lognormal losses, sigma {sigma}": coverage(
            partial(ratio, sigma=sigma), float(np.exp(sigma**2 / 2)), repeats, seed=1
        )
        for sigma in (0.5, 0.8)
    }
    rows["paired difference of right and wrong"] = coverage(difference, -0.05, repeats, seed=2)
    table = Table("95 % interval of a", f"holds the truth, of {repeats}")
    for name, share in rows.items():
        table.add_row(name, f"{100 * share:.1f} %")
    Console().print(table)
    if not all(LOWEST <= share <= HIGHEST for share in rows.values()):
        sys.exit("an interval holds the truth too rarely or too often")


if __name__ == "__main__":
    main()
