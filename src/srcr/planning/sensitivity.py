"""What each decision unit loses at each level: its own output error, and its effect on the model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from srcr.errors import InputError
from srcr.planning.levels import Decision, Level, Treatment
from srcr.types import SweepSpec


@dataclass(frozen=True)
class Loss:
    """A level, the squared ``error`` of the unit's outputs relative to their energy, and where it was
    measured ``kl``: KL(base || model with this unit alone at this level), nats a token."""

    sparsity: float
    num_bits: int
    error: float
    kl: float | None = None

    @property
    def level(self) -> Level:
        return Level(self.sparsity, self.num_bits)


@dataclass(frozen=True)
class UnitLosses:
    """The losses of one unit: linears ``names`` of together ``size`` weights."""

    names: tuple[str, ...]
    size: int
    losses: tuple[Loss, ...]


@dataclass(frozen=True)
class Table:
    """What ``srcr sensitivity`` finds, and ``srcr plan`` chooses from."""

    base: str
    base_sha256: str
    calibration: dict[str, Any]
    treatment: Treatment
    sweep: SweepSpec
    units: tuple[UnitLosses, ...]
    seconds: float = 0.0
    text: dict[str, Any] | None = None

    def predicted(self) -> list[list[tuple[Level, float]]]:
        """The loss of every level of every unit in nats: measured where it was, else the unit's error times
        what an error cost where it was measured (in that unit, else in all)."""
        rates = [_rate(unit.losses) for unit in self.units]
        known = [rate for rate in rates if rate is not None]
        common = math.exp(sum(map(math.log, known)) / len(known)) if known else 1.0
        return [
            [
                (
                    loss.level,
                    max(loss.kl, 0.0) if loss.kl is not None else (rate or common) * loss.error,
                )
                for loss in unit.losses
            ]
            for unit, rate in zip(self.units, rates, strict=True)
        ]


def _rate(losses: Sequence[Loss]) -> float | None:
    """KL an error of 1 stands for: the geometric mean over a unit's measured levels."""
    found = [
        math.log(x.kl / x.error) for x in losses if x.kl is not None and x.kl > 0 and x.error > 0
    ]
    return math.exp(sum(found) / len(found)) if found else None


def unit_losses(unit: Decision, size: int, errors: Sequence[tuple[Level, float]]) -> UnitLosses:
    """A unit's row of the table, before any KL."""
    found = tuple(Loss(level.sparsity, level.num_bits, error) for level, error in errors)
    return UnitLosses(unit.names, size, found)


def with_kl(row: UnitLosses, level: Level, kl: float) -> UnitLosses:
    """The row with one more measurement."""
    losses = tuple(replace(x, kl=kl) if x.level == level else x for x in row.losses)
    return replace(row, losses=losses)


def subset(levels: Sequence[Level], n: int) -> list[Level]:
    """``n`` of the levels, spread evenly over what they cost, the outermost among them.

    Raises:
        InputError: a negative number.
    """
    if n < 0:
        raise InputError(
            f"probes {n} must not be negative: it is how many levels of each unit are measured"
        )
    ordered = sorted(levels, key=lambda level: ((1 - level.sparsity) * level.num_bits, level))
    if n >= len(ordered):
        return ordered
    if n <= 1:
        return ordered[len(ordered) // 2 : len(ordered) // 2 + n]
    return [ordered[round(i * (len(ordered) - 1) / (n - 1))] for i in range(n)]
