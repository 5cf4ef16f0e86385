"""sensitivity(): what each decision unit loses at each level, by its own output error and, for some levels,
by its effect on the model's predictions."""

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from srcr import progress
from srcr.calibration import Tokens
from srcr.compression import Calibration
from srcr.errors import InputError
from srcr.planning.building import Space
from srcr.planning.candidates import Choice
from srcr.planning.database import LevelDatabase
from srcr.planning.field import NONE, Field, Resources, fill_database, open_field
from srcr.planning.levels import Level, Treatment, size_of
from srcr.planning.workers import connected, crew
from srcr.types import SweepSpec

#: Levels at which each unit is measured by KL, if not said otherwise.
PROBES = 3


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

    @property
    def levels(self) -> tuple[Level, ...]:
        """The levels of every unit.

        Raises:
            InputError: units have different ones, or the table is empty.
        """
        found = {tuple(loss.level for loss in unit.losses) for unit in self.units}
        if len(found) != 1:
            raise InputError("the table's units do not all have the same levels")
        return found.pop()

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


def sensitivity(
    model: str | Path,
    space: Space,
    calibration: Calibration,
    probes: int = PROBES,
    resources: Resources = NONE,
    seed: int = 0,
    device: str = "auto",
    quiet: bool = False,
) -> Table:
    """The output error of every unit of ``model`` at every level of ``space``, and the KL of the whole model
    with that unit alone at ``probes`` of them. One pass of Hessians serves them all.

    The level database is made where ``resources`` say, or in a temporary folder.

    Raises:
        InputError: as :func:`srcr.compress`; the database is too large.
    """
    started = time.monotonic()
    measured = subset(space.levels, probes)
    field = open_field(model, calibration, seed, device, quiet)
    with tempfile.TemporaryDirectory(prefix="srcr-levels-") as folder:
        return measure_table(field, space, measured, resources, Path(folder), started, quiet)


def measure_table(
    field: Field, space: Space, measured: Sequence[Level], resources: Resources, default: Path,
    started: float, quiet: bool,
) -> Table:  # fmt: skip
    """The table of an open field, with a KL at the levels ``measured``."""
    kl: dict[tuple[int, Level], float] = {}
    units = field.units
    wanted = [(i, level) for i in range(len(units)) for level in measured]
    with connected(resources.ray) as ray:
        database = fill_database(field, space, resources, default, ray, quiet)
        if wanted:
            workers = crew(field.bench(database), ray)
            workers.stand_at((None,) * len(units))
            choices: list[Choice] = [
                tuple(level if i == number else None for i in range(len(units)))
                for number, level in wanted
            ]
            with progress.stage("measure", len(choices), quiet) as bar:
                for (number, level), found in zip(wanted, workers.measure(choices), strict=True):
                    kl[number, level] = found.kl
                    bar.note(f"{units[number].label} at {level}: KL {found.kl:.3g}", advance=1)
    table = losses_table(field, space, database, kl)
    return replace(table, seconds=round(time.monotonic() - started, 3))


def losses_table(
    field: Field, space: Space, database: LevelDatabase, kl: Mapping[tuple[int, Level], float]
) -> Table:
    """The table of what is known: errors from the database, KL by unit number and level where measured."""
    topology = field.source.topology
    rows = tuple(
        UnitLosses(
            unit.names,
            size_of(unit, topology),
            tuple(
                Loss(x.sparsity, x.num_bits, field.error(database, unit, x), kl.get((i, x)))
                for x in space.levels
            ),
        )
        for i, unit in enumerate(field.units)
    )
    return Table(
        field.name, field.sha256, _short(field.texts.calibration), space.treatment, space.sweep, rows,
        text=_short(field.texts.search) if kl else None,
    )  # fmt: skip


def _short(tokens: Tokens) -> dict[str, Any]:
    """A text's record without the hash of every sequence."""
    return {key: value for key, value in tokens.record().items() if key != "rows"}


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
