"""About how long each command takes, from start to end."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from srcr.data.sources import held_out_request, recovery_requests
from srcr.data.specs import Calibration, RecoveryText, Source
from srcr.data.splits import CHOICE, TEST, search_sequences
from srcr.data.tokens import Tokens
from srcr.models.checkpoint import OpenModel
from srcr.pipelines.duration import (
    SearchCounts,
    Stopwatch,
    compression_seconds,
    files_seconds,
    recovery_seconds,
    search_seconds,
)
from srcr.pipelines.opening import writes_itself
from srcr.pipelines.preparing import Setup
from srcr.pipelines.text_size import asked_text, empty_batches, row_length
from srcr.pipelines.training import Recovery
from srcr.planning.space import SearchSpace
from srcr.planning.specs import SearchSpec
from srcr.plans.objective import Constraint
from srcr.plans.plan import Target
from srcr.plans.recovery import RecoverySpec


def stopwatch(opened: OpenModel, device: torch.device) -> Stopwatch:
    """What times pieces of work for a model."""
    return Stopwatch(opened, device, opened.blockwise.on(device).running)


def compression_time(
    setup: Setup,
    calibration: Calibration | Tokens | Source,
    recovery: Recovery | None,
    batches: Sequence[Tensor],
    dense: int,
    stored: int,
) -> float:
    """Seconds of a compression to so many ``stored`` bytes, its text and its training with it."""
    watch, plan = stopwatch(setup.smaller, setup.device), setup.plan
    seconds = compression_seconds(watch, plan.by_name(), plan.solver, batches, dense)
    seconds += files_seconds(setup.opened.weight_bytes, stored)
    text = asked_text(calibration)
    if isinstance(text, Calibration) and writes_itself(text):
        rows = sum(len(ids) for ids in batches)
        seconds += watch.writing(rows, row_length(text, setup.opened))
    if recovery is not None:
        seconds += recovery_time(watch, recovery.spec, recovery.text)
    return seconds


def search_time(
    opened: OpenModel,
    target: Target | Constraint,
    space: SearchSpace,
    calibration: Calibration,
    spec: SearchSpec,
    device: torch.device,
) -> float:
    """Seconds of a search, its text with it."""
    watch, batches, length = (
        stopwatch(opened, device), empty_batches(calibration, opened), row_length(calibration, opened)
    )  # fmt: skip
    groups, levels = space.groups(opened.topology), space.levels
    names = [name for group in groups for name in group.names]
    middle = space.plan(dict.fromkeys(names, levels[len(levels) // 2]), opened.topology, 0)
    plans, solver = middle.by_name(), middle.solver
    compressing = compression_seconds(watch, plans, solver, batches, len(batches))
    compressing += files_seconds(opened.weight_bytes, opened.weight_bytes // 4)
    search = search_sequences(opened.parameters)
    bisected = math.ceil(math.log2(1 / spec.tcr_precision))
    constrained = isinstance(target, Constraint)
    measured = len(groups) * spec.exploration.probes
    counts = SearchCounts(
        len(levels),
        measured if constrained else spec.trials,
        search * length,
        bisected if constrained else spec.finalists,
        (CHOICE + TEST) * length,
    )
    solving = watch.solving(plans, solver, dense=False)
    seconds = search_seconds(watch, counts, solving, compressing, length)
    if writes_itself(calibration):
        rows = sum(len(ids) for ids in batches) + search + CHOICE + TEST
        seconds += watch.writing(rows, length)
    if spec.recovery is not None:
        seconds += recovery_seconds(watch, spec.recovery, length)
    return seconds


def recovery_time(watch: Stopwatch, spec: RecoverySpec, text: RecoveryText) -> float:
    """Seconds of a training, its text with it."""
    length = row_length(text, watch.opened)
    requests = [*recovery_requests(text, 0), held_out_request(text, 0)]
    written = sum(each.samples or each.default_samples for each in requests if each.written)
    seconds = watch.writing(written, length) if written else 0.0
    return seconds + recovery_seconds(watch, spec, length)
