"""sensitivity(): what each group of linears loses at each level, by its own output error and, where it is
measured, by its effect on the model's predictions."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from srcr.data.specs import Calibration, Source, check_calibration
from srcr.models.checkpoint import ModelLike
from srcr.pipelines.levels import fill_database, open_context, open_evaluator
from srcr.pipelines.opening import open_original
from srcr.pipelines.options import RunOptions
from srcr.pipelines.progress import stage
from srcr.planning.context import SearchContext
from srcr.planning.evaluators.ray import check_ray, connected
from srcr.planning.space import Assignment, SearchSpace, spread_levels
from srcr.planning.specs import ExplorationSpec, MeasurementSpec, Resources
from srcr.planning.table import sensitivity_table, single_kl
from srcr.plans.specs import CompressionLevel
from srcr.records.search import Measurement
from srcr.records.sensitivity import SensitivityTable


@torch.no_grad()
def sensitivity(
    model: ModelLike,
    space: SearchSpace = SearchSpace(),
    calibration: Calibration | Source = Calibration(),
    probes: int = ExplorationSpec.probes,
    resources: Resources = Resources(),
    options: RunOptions = RunOptions(),
) -> SensitivityTable:
    """The output error of every group of ``model`` at every level of ``space``, and the KL of the whole model
    with that group alone at ``probes`` of them. One pass of Hessians serves them all.

    The level database is made where ``resources`` say, or in a temporary folder.

    Raises:
        InputError: as :func:`srcr.compress`; the database is too large.

    >>> sensitivity("bundled", calibration="bundled").levels[0]
    CompressionLevel(sparsity=0.5, num_bits=2)
    """
    started = time.monotonic()
    measured = spread_levels(space.levels, probes)
    check_calibration(calibration)
    opened = open_original(model, options)
    check_ray(resources.ray, opened)
    measurement = MeasurementSpec()
    context, policy = open_context(
        opened, space, Calibration.of(calibration), measurement if measured else None, 0, options
    )
    measurement = replace(measurement, cache_bytes=policy.cache_bytes)
    table = measure_table(context, space, measured, measurement, resources, options)
    return replace(table, seconds=round(time.monotonic() - started, 3))


def measure_table(
    context: SearchContext,
    space: SearchSpace,
    measured: Sequence[CompressionLevel],
    measurement: MeasurementSpec,
    resources: Resources,
    options: RunOptions,
) -> SensitivityTable:
    """The table of an open model, with a KL at the levels ``measured``."""
    groups = context.groups
    dense: Assignment = (None,) * len(groups)
    alone: list[Assignment] = [
        (*dense[:i], level, *dense[i + 1 :]) for i in range(len(groups)) for level in measured
    ]
    results: dict[Assignment, Measurement] = {}
    with (
        tempfile.TemporaryDirectory(prefix="srcr-levels-") as folder,
        connected(resources.ray) as ray,
    ):
        database = fill_database(context, space, resources, Path(folder), ray, options)
        if alone:
            evaluator = open_evaluator(context, database, ray, measurement)
            evaluator.center_on(dense)
            with stage("measure", len(alone), options.quiet) as bar:
                labels = [f"{group.label} at {level}" for group in groups for level in measured]
                for assignment, label, result in zip(
                    alone, labels, evaluator.measure(alone), strict=True
                ):
                    results[assignment] = result
                    bar.note(f"{label}: KL {result.kl:.3g}", advance=1)
        return sensitivity_table(context, space, database, single_kl(results))
