"""plan(): the best plan for a size, by a table of losses."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from srcr.compression import Calibration
from srcr.errors import InputError
from srcr.formats import get_format
from srcr.models.load import resolve, sha256, weight_files
from srcr.models.weights import ModelWeights, open_weights
from srcr.planning.allocation import Option, allocate
from srcr.planning.budget import Budget
from srcr.planning.building import Space
from srcr.planning.field import NONE, Resources, open_field
from srcr.planning.levels import Decision, Level, decisions
from srcr.planning.sensitivity import PROBES, Table, measure_table, subset
from srcr.planning.uniform import check_reachable, worthwhile
from srcr.types import CompressionPlan, Target


def plan(
    model: str | Path,
    target: Target,
    space: Space,
    calibration: Calibration,
    table: Table | None = None,
    format_name: str = "compressed-tensors",
    resources: Resources = NONE,
    seed: int = 0,
    device: str = "auto",
    quiet: bool = False,
) -> CompressionPlan:
    """The plan with the least predicted loss at the size ``target``, met from below: by ``table`` (whose
    levels, methods and grid then count instead of ``space``), or by one that is made here.

    Raises:
        InputError: the target is out of reach, the table is of another model; as :func:`sensitivity`.
    """
    started = time.monotonic()
    if table is not None:
        folder = resolve(model)
        source = open_weights(folder, device if device != "auto" else "cpu")
        _check_table(table, sha256(weight_files(folder)), source)
        space = Space(table.levels, table.treatment, table.sweep)
        return allocated(source, target, space, format_name, table.predicted(), seed)
    field = open_field(model, calibration, seed, device, quiet)
    budget = Budget.of(target, field.source, space.treatment, get_format(format_name))
    space = replace(space, levels=worthwhile(space.levels, budget))
    # A target out of reach is refused before the work.
    allocated(field.source, target, space, format_name, None, seed)
    with TemporaryDirectory(prefix="srcr-levels-") as work:
        found = measure_table(
            field, space, subset(space.levels, PROBES), resources, Path(work), started, quiet
        )
    return allocated(field.source, target, space, format_name, found.predicted(), seed)


def _check_table(table: Table, base_sha256: str, source: ModelWeights) -> None:
    if table.base_sha256 != base_sha256:
        raise InputError(
            f"the table is of another model ({table.base}): make one with srcr sensitivity"
        )
    if [unit.names for unit in table.units] != [unit.names for unit in decisions(source.topology)]:
        raise InputError(
            "the table's units are not those of the model: make it again with srcr sensitivity"
        )


def allocated(
    source: ModelWeights,
    target: Target,
    space: Space,
    format_name: str,
    losses: Sequence[Sequence[tuple[Level, float]]] | None,
    seed: int,
) -> CompressionPlan:
    """The plan that loses least by these ``losses`` of each unit's levels (None: all alike).

    Raises:
        InputError: the target is out of reach.
    """
    budget = Budget.of(target, source, space.treatment, get_format(format_name))
    units = decisions(source.topology)
    costs = unit_costs(units, space.levels, budget)
    check_reachable(costs, budget, source.topology)
    if losses is not None:
        costs = [
            [Option(option.cost, loss) for option, (_, loss) in zip(unit, found, strict=True)]
            for unit, found in zip(costs, losses, strict=True)
        ]
    chosen = allocate(costs, budget.limit).choice
    levels = {
        name: space.levels[number]
        for unit, number in zip(units, chosen, strict=True)
        for name in unit.names
    }
    return replace(space.plan(fill(levels, budget), source.topology, seed), target=target)


def unit_costs(
    units: Sequence[Decision], levels: Sequence[Level], budget: Budget
) -> list[list[Option]]:
    """What every unit costs at every level; losses are not known."""
    return [
        [Option(sum(budget.cost(name, level) for name in unit.names), 0.0) for level in levels]
        for unit in units
    ]


def fill(levels: Mapping[str, Level], budget: Budget) -> dict[str, Level]:
    """The levels with fewer zeros, as far as the budget goes: by TCr, where zeros count, and from the layer
    with the most."""
    found = dict(levels)
    if not budget.counts_zeros:
        return found
    left = budget.limit - sum(budget.cost(name, level) for name, level in found.items())
    for name in sorted(found, key=lambda name: (-found[name].sparsity, name)):
        level, (rows, cols) = found[name], budget.shapes[name]
        if level.sparsity == 0 or left < level.num_bits:
            continue
        pruned = round(level.sparsity * rows * cols)
        pruned -= min(pruned, left // level.num_bits)
        finer = Level(pruned / (rows * cols), level.num_bits)
        left -= budget.cost(name, finer) - budget.cost(name, level)
        found[name] = finer
    return found
