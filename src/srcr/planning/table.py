"""The table of losses, from what a database and measurements know."""

from collections.abc import Mapping

import numpy as np

from srcr.models.topology import LinearGroup
from srcr.planning.allocate import Floats
from srcr.planning.context import SearchContext
from srcr.planning.database.store import LevelDatabase
from srcr.planning.space import Assignment, SearchSpace
from srcr.plans.specs import CompressionLevel
from srcr.records.search import Measurement
from srcr.records.sensitivity import GroupLosses, LevelLoss, SensitivityTable

#: The KL of the model with one group alone at a level, by the group's number and the level.
SingleKl = Mapping[tuple[int, CompressionLevel], float]


def group_error(
    context: SearchContext, database: LevelDatabase, group: LinearGroup, level: CompressionLevel
) -> float:
    """The mean relative output error of a group's linears, by their weights; 0 where nothing is done."""
    errors = database.errors(group, level)
    if errors is None:
        return 0.0
    shapes = context.topology.shapes
    sizes = {name: shapes[name][0] * shapes[name][1] for name in group.names}
    return sum(sizes[n] * errors[n] for n in group.names) / sum(sizes.values())


def level_errors(
    context: SearchContext, database: LevelDatabase, space: SearchSpace
) -> tuple[Floats, ...]:
    """The output errors [levels] of each group."""
    return tuple(
        np.array([group_error(context, database, group, level) for level in space.levels])
        for group in context.groups
    )


def single_kl(measured: Mapping[Assignment, Measurement]) -> SingleKl:
    """What is known of each group alone."""
    return {
        (number, level): result.kl
        for assignment, result in measured.items()
        for number, level in enumerate(assignment)
        if level is not None and sum(each is not None for each in assignment) == 1
    }


def sensitivity_table(
    context: SearchContext, space: SearchSpace, database: LevelDatabase, kl: SingleKl
) -> SensitivityTable:
    """Errors of every group at every level, and KL where it was measured."""
    groups = tuple(
        GroupLosses(
            group.names,
            context.topology.group_size(group),
            tuple(
                LevelLoss(
                    level.sparsity,
                    level.num_bits,
                    group_error(context, database, group, level),
                    kl.get((number, level)),
                )
                for level in space.levels
            ),
        )
        for number, group in enumerate(context.groups)
    )
    return SensitivityTable(
        context.opened.name,
        context.opened.sha256,
        context.splits.calibration.record(rows=False),
        groups,
        space.prune,
        space.quant,
        space.solver,
        embeddings=space.embeddings,
        text=context.splits.search.record(rows=False) if kl else None,
    )
