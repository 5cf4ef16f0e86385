"""Fills the level database: one walk over the blocks, one factorisation a unit, every level from it."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from srcr import engine
from srcr.compression import named, settle_groups, to_cpu, versions
from srcr.errors import InputError
from srcr.methods.joint import Factors, compress_unit
from srcr.models.topology import Topology
from srcr.models.weights import ModelWeights
from srcr.planning.database import LevelDatabase, entry_bytes
from srcr.planning.levels import Decision, Level, Treatment, size_of
from srcr.types import (
    CompressedWeight,
    CompressionPlan,
    LayerPlan,
    LayerStats,
    SweepSpec,
    to_dict,
)

#: Rounds of refitted scales and descent that a level of the database gets at most.
DRAFT_ROUNDS = 1


@dataclass(frozen=True)
class Space:
    """What a plan chooses from: levels, and how each is made (``treatment``, ``sweep``)."""

    levels: tuple[Level, ...]
    treatment: Treatment = Treatment()  # noqa: RUF009 - frozen
    sweep: SweepSpec = SweepSpec()  # noqa: RUF009 - frozen

    def draft(self) -> SweepSpec:
        """How a level of the database is solved: as ``sweep`` says, but polished once at most. Levels are
        compared with each other; what comes of the comparison is compressed again."""
        return replace(self.sweep, descent_rounds=min(DRAFT_ROUNDS, self.sweep.descent_rounds))

    def plan(self, levels: Mapping[str, Level], topology: Topology, seed: int) -> CompressionPlan:
        """The plan that gives each linear, by name, its level; group sizes settled."""
        layers = tuple(self.treatment.layer(name, levels[name]) for name in topology.shapes)
        return settle_groups(CompressionPlan(layers, None, seed, self.sweep), topology)[0]

    def unit_plans(self, unit: Decision, level: Level, topology: Topology) -> dict[str, LayerPlan]:
        """The plans of a unit's linears at a level."""
        layers = tuple(self.treatment.layer(name, level) for name in unit.names)
        return settle_groups(CompressionPlan(layers), topology)[0].by_name()


def context(
    space: Space, base_sha256: str, calibration_sha256: str, device: str, running: torch.dtype
) -> str:
    """A hash of everything that decides an entry of the database besides unit and level."""
    treatment = to_dict(space.treatment)
    for spec, key in (("prune", "sparsity"), ("quant", "num_bits")):
        treatment[spec].pop(key, None)
    parts: list[Any] = [
        treatment, to_dict(space.draft()), base_sha256, calibration_sha256, device,
        str(running), versions(),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def database_bytes(units: Sequence[Decision], levels: Sequence[Level], topology: Topology) -> int:
    """About how many bytes the database of all units at all levels takes."""
    total = 0
    for unit in units:
        rows = sum(topology.shapes[name][0] for name in unit.names)
        size = size_of(unit, topology)
        total += sum(entry_bytes(size, level, rows) for level in levels if level.num_bits < 16)
    return total


def check_room(needed: int, limit: int | None, free: int) -> None:
    """Refuse a database that is larger than the user's limit, or than the disk has room for.

    Raises:
        InputError: with what is needed, and what to do.
    """
    remedy = "use fewer --sparsities or --widths"
    if limit is not None and needed > limit:
        raise InputError(
            f"the level database takes about {needed / 1e6:.1f} MB, the limit is {limit / 1e6:.1f} MB: "
            f"{remedy}, or a higher --database-limit"
        )
    if needed > free:
        raise InputError(
            f"the level database takes about {needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free on its "
            f"disk: {remedy}, or put it elsewhere with --database"
        )


@dataclass(frozen=True, eq=False)
class LevelInputs:
    """What all levels of a unit are made from; ``factors`` of the statistics are shared."""

    weights: dict[str, Tensor]
    stats: LayerStats
    sweep: SweepSpec
    dtype: torch.dtype
    factors: Factors


def compress_level(inputs: LevelInputs, plans: dict[str, LayerPlan]) -> dict[str, CompressedWeight]:
    """One level of a unit, by the plans of its linears."""
    made = compress_unit(
        inputs.weights, inputs.stats, plans, inputs.sweep, inputs.dtype, inputs.factors
    )
    return {name: to_cpu(weight) for name, weight in made.items()}


#: Makes some levels of a unit, in their order.
Spread = Callable[
    [LevelInputs, Sequence[dict[str, LayerPlan]]], Iterable[dict[str, CompressedWeight]]
]


def one_by_one(
    inputs: LevelInputs, plans: Sequence[dict[str, LayerPlan]]
) -> Iterable[dict[str, CompressedWeight]]:
    """In this process."""
    return (compress_level(inputs, one) for one in plans)


@torch.no_grad()
def build(
    source: ModelWeights,
    batches: Sequence[Tensor],
    space: Space,
    database: LevelDatabase,
    units: Sequence[Decision],
    watcher: engine.Watcher,
    room: engine.Room,
    spread: Spread = one_by_one,
) -> None:
    """Compress every unit at every level that the database does not hold, each on its own: given the dense
    model's inputs. (Given those of a compressed model, each level would make up for what is lost before it;
    such levels cannot be swapped one by one, docs/decisions/007.) ``spread`` makes several at once."""
    missing = {
        unit: [level for level in space.levels if level.num_bits < 16 or level.sparsity > 0]
        for unit in units
    }
    for unit, levels in missing.items():
        missing[unit] = [level for level in levels if database.find(unit.names, level) is None]
    left = {unit for unit, levels in missing.items() if levels}
    by_first = {unit.names[0]: unit for unit in units}

    def visit(view: engine.BlockView) -> None:
        for part in view.units:
            full = [view.full_name(name) for name in part.names]
            unit = by_first[full[0]]
            if missing[unit]:
                weights = {
                    name: view.weight(short) for name, short in zip(full, part.names, strict=True)
                }
                stats = view.statistics(part, cross=False)
                _fill(unit, weights, stats)
                left.discard(unit)

    def _fill(unit: Decision, weights: dict[str, Tensor], stats: LayerStats) -> None:
        first, *others = missing[unit]
        plans = [space.unit_plans(unit, level, source.topology) for level in missing[unit]]
        inputs = LevelInputs(weights, stats, space.draft(), source.dtype, {})
        with named(unit.names[0]):
            database.put(
                unit.names, first, compress_level(inputs, plans[0])
            )  # and the factor is known
            for level, made in zip(others, spread(inputs, plans[1:]), strict=True):
                database.put(unit.names, level, made)

    if left:
        for _ in engine.walk(source, batches, visit, watcher, dense_batches=0, room=room):
            if not left:
                break
