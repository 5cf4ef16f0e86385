"""plan(): the best plan for a size, by a table of losses."""

import glob
from dataclasses import replace

import torch

from srcr.data.specs import Calibration, Source, check_calibration
from srcr.errors import InputError
from srcr.formats import get_format
from srcr.models.checkpoint import ModelLike, OpenModel
from srcr.pipelines.levels import open_context, space_for
from srcr.pipelines.opening import open_original
from srcr.pipelines.options import RunOptions
from srcr.pipelines.sensitivity import measure_table
from srcr.planning.costs import SizeBudget, check_reachable
from srcr.planning.evaluators.ray import check_ray
from srcr.planning.plans import allocated_plan
from srcr.planning.space import SearchSpace, spread_levels
from srcr.planning.specs import ExplorationSpec, MeasurementSpec, Resources
from srcr.planning.uniform import worthwhile_levels
from srcr.plans.plan import CompressionPlan, Target
from srcr.records.sensitivity import SensitivityTable


@torch.no_grad()
def plan(
    model: ModelLike,
    target: Target,
    space: SearchSpace | SensitivityTable = SearchSpace(),
    calibration: Calibration | Source = Calibration(),
    format_name: str = "compressed-tensors",
    resources: Resources = Resources(),
    options: RunOptions = RunOptions(),
) -> CompressionPlan:
    """The plan with the least predicted loss at the size ``target``, met from below. ``space``: what it
    chooses from, by a table that is made here; or a table of :func:`srcr.sensitivity`, whose levels, methods
    and grid count, and which needs no calibration.

    Raises:
        InputError: the target is out of reach, the table is of another model; as :func:`sensitivity`.

    >>> plan("bundled", Target(tcr=0.8125), calibration="bundled").target
    Target(tcr=0.8125, stored_bytes=None, loaded_bytes=None)
    """
    fmt = get_format(format_name)
    check_calibration(calibration)
    opened = open_original(model, options)
    if isinstance(space, SensitivityTable):
        table, space = space, _space_of(space, opened)
        budget = SizeBudget.of(target, opened.blockwise, space, format_name)
        return allocated_plan(table.predicted(), budget, target, options.seed or 0)
    check_ray(resources.ray, opened)
    space = space_for(space, fmt, opened)
    budget = SizeBudget.of(target, opened.blockwise, space, format_name)
    space = replace(space, levels=worthwhile_levels(space.levels, budget))
    budget = replace(budget, space=space)
    check_reachable(budget)  # before the work
    measurement = MeasurementSpec()
    context, policy = open_context(
        opened, space, Calibration.of(calibration), measurement, 0, options
    )
    measurement = replace(measurement, cache_bytes=policy.cache_bytes)
    probes = spread_levels(space.levels, ExplorationSpec.probes)
    table = measure_table(context, space, probes, measurement, resources, options)
    return allocated_plan(table.predicted(), budget, target, context.seed)


def _space_of(table: SensitivityTable, opened: OpenModel) -> SearchSpace:
    """The levels of a table, how they were made, and of what.

    Raises:
        InputError: the table is of another model; says which.
    """
    if table.base_sha256 != opened.sha256:
        raise InputError(
            f"the table is of another model ({table.base}): make one with srcr sensitivity"
        )
    known = {name for group in table.groups for name in group.names}
    others = tuple(glob.escape(name) for name in opened.topology.shapes if name not in known)
    space = SearchSpace(
        table.levels, table.prune, table.quant, table.solver,
        ignore=others, embeddings=table.embeddings,
    )  # fmt: skip
    groups = [group.names for group in space.groups(opened.topology)]
    if groups != [group.names for group in table.groups]:
        raise InputError(
            "the table's groups are not those of the model: make it again with srcr sensitivity"
        )
    return space
