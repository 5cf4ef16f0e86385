"""What a compression is to do: everything that can be refused, before any work is done."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from srcr.data.sources import calibration_request
from srcr.data.specs import Calibration, Source, check_calibration, check_text
from srcr.data.token_ids import check_tokens
from srcr.data.tokens import Tokens, context_length
from srcr.engine.memory import MemoryPolicy, choose_policy, estimate_memory
from srcr.environment import (
    format_megabytes,
    parse_size,
    resident_memory,
    select_device,
    versions,
)
from srcr.errors import InputError
from srcr.formats import Format, get_format
from srcr.formats.checkpoint import Contents, planned_contents
from srcr.methods import check_methods
from srcr.models.blockwise import BlockwiseModel
from srcr.models.checkpoint import ModelLike, OpenModel
from srcr.pipelines.notes import left_alone, left_out, quantized_already
from srcr.pipelines.opening import (
    TextModel,
    load_text,
    open_with_bar,
    writes_itself,
    writing_memory,
)
from srcr.pipelines.options import Output, RunOptions
from srcr.pipelines.progress import say, stage
from srcr.pipelines.refusals import check_original, check_place
from srcr.pipelines.resolving import DEFAULT_FORMAT, pick_format, resolve_plan, sizes_of_plan
from srcr.pipelines.training import (
    Recovery,
    Texts,
    check_memory,
    load_texts,
)
from srcr.plans.plan import CompressionPlan, Recipe
from srcr.plans.settings import recipe_of
from srcr.serialize import digest
from srcr.storage.atomic import partial_path
from srcr.structure.sizes import StructureSize, planned_smaller, resolved


@dataclass(frozen=True, eq=False)
class Work:
    """A run under way: the ``opened`` model, the same on its device (``blocks``) and its hash, how many of
    its structures go (``sizes``), the resolved ``plan``, the format and what a checkpoint in it holds, the
    calibration data, ``notes`` for the record."""

    opened: OpenModel
    blocks: BlockwiseModel
    base_sha256: str
    sizes: tuple[StructureSize, ...]
    plan: CompressionPlan
    fmt: Format
    contents: Contents
    tokens: Tokens
    notes: tuple[str, ...]
    options: RunOptions
    started: float
    recovery: Recovery | None = None
    texts: Texts | None = None

    def fingerprint(self) -> dict[str, str]:
        """Everything that decides the result."""
        return {
            "plan": self.plan.fingerprint(),
            "calibration": self.tokens.sha256,
            "base": self.base_sha256,
            "format": self.fmt.name,
            "device": self.blocks.device.type,
            "precision": str(self.blocks.running),
            **self._training(),
            **versions(),
        }

    def _training(self) -> dict[str, str]:
        """What of a recovery decides the result."""
        if self.recovery is None or self.texts is None:
            return {}
        return {
            "training": digest(self.recovery.spec),
            "training text": self.texts.train.sha256,
            "held-out text": self.texts.held_out.sha256,
        }


def planned(
    plan: CompressionPlan | Recipe | None, settings: Mapping[str, Any]
) -> CompressionPlan | Recipe:
    """The plan that was given, or the recipe of the settings.

    Raises:
        InputError: both were given, or the settings are no recipe's.
    """
    if plan is None:
        return recipe_of(settings)
    if settings:
        raise InputError(f"the plan decides {next(iter(settings))}: give either, not both")
    return plan


@dataclass(frozen=True, eq=False)
class Setup:
    """What a compression comes to by names, shapes and settings: the ``opened`` model, the same without the
    structures that go (``smaller``), the ``device``, and as in :class:`Work`."""

    opened: OpenModel
    smaller: OpenModel
    device: torch.device
    sizes: tuple[StructureSize, ...]
    plan: CompressionPlan
    fmt: Format
    contents: Contents
    notes: tuple[str, ...]


def set_up(
    model: ModelLike,
    plan: CompressionPlan | Recipe,
    output: Output,
    options: RunOptions,
    recovery: Recovery | None,
) -> Setup:
    """Everything that can be refused before the weights are read, and what the plan means for the model."""
    check_methods(plan)
    settings = get_format(output.format or DEFAULT_FORMAT)
    if recovery is not None:
        check_text(recovery.text)
    check_place(output, model, options)
    check_original(model, options)
    opened = open_with_bar(model, options)
    sizes = sizes_of_plan(plan, opened)
    smaller = planned_smaller(opened, sizes)
    plan, grouping = resolve_plan(plan, smaller, options.seed, settings)
    plan = replace(plan, structures=resolved(sizes) if sizes else None)
    contents = planned_contents(plan, smaller)
    fmt, fallback = pick_format(output.format, contents)
    fmt.check_model(opened)
    aloud = (
        quantized_already(opened),
        f"structures: {', '.join(map(str, sizes))} are left" if sizes else None,
        grouping,
        fallback,
        *fmt.notes(contents),
        left_alone(smaller, plan),
        left_out(opened),
    )
    notes = tuple(note for note in aloud if note)
    device = select_device(options.device)
    if recovery is not None:
        check_memory(opened, recovery.spec, device, options)
    return Setup(opened, smaller, device, sizes, plan, fmt, contents, notes)


def prepare(
    model: ModelLike,
    plan: CompressionPlan | Recipe,
    calibration: Calibration | Tokens | Source,
    output: Output,
    options: RunOptions,
    recovery: Recovery | None,
) -> Work:
    """Everything that can be refused, before any work is done: what is cheap to check first."""
    started = time.monotonic()
    check_calibration(calibration)
    setup = set_up(model, plan, output, options, recovery)
    opened, device, notes = setup.opened, setup.device, setup.notes
    for note in notes:
        say(note, options.quiet)
    blocks = opened.blockwise.on(device)
    base_sha256 = _hash_weights(opened, options)
    if isinstance(calibration, Tokens):
        tokens = check_tokens(calibration, opened)
    else:
        calibration = Calibration.of(calibration)
        if options.memory is not None and writes_itself(calibration):
            check_whole(opened, calibration, parse_size(options.memory), device)
        request = calibration_request(calibration, setup.plan.seed)
        tokens = load_text(request, TextModel(opened, device.type), "calibrate", options)
    notes = (*notes, *tokens.notes)
    texts = None if recovery is None else load_texts(recovery.text, opened, device, options)
    return Work(
        opened, blocks, base_sha256, setup.sizes, setup.plan, setup.fmt, setup.contents,
        tokens, notes, options, started, recovery, texts,
    )  # fmt: skip


def _hash_weights(opened: OpenModel, options: RunOptions) -> str:
    """The hash of the weights, each of which is checked on the way."""
    with stage("check", 1, options.quiet) as bar:
        bar.note("weights")
        sha256 = opened.sha256
        bar.note("weights", advance=1)
    return sha256


def check_whole(
    opened: OpenModel, calibration: Calibration, budget: int, device: torch.device
) -> None:
    """Refuse to load a model whole that does not fit the budget.

    Raises:
        InputError: says how much it takes.
    """
    if opened.blockwise.in_memory:
        return
    writer = TextModel(opened, device.type)
    length = min(calibration.seq_len, context_length(opened.config) or calibration.seq_len)
    size = resident_memory(device) + writing_memory(writer, max(1, length))
    if size > budget:
        raise InputError(
            f"--memory {format_megabytes(budget)} is too little for calibration 'self': the model writes it, "
            f"and has to be loaded whole for that; use at least {format_megabytes(1.02 * size)}, or another "
            "--calibration"
        )


def count_dense_batches(work: Work, batches: tuple[Tensor, ...]) -> int:
    """On how many of the batches the dense model runs as well."""
    widest = max(cols for _, cols in work.opened.topology.shapes.values())
    return work.plan.solver.dense_batches(len(batches), sum(ids.numel() for ids in batches), widest)


def choose_memory(
    work: Work, batches: tuple[Tensor, ...], dense_batches: int, output: Output
) -> MemoryPolicy:
    """How the walk uses the memory that it may take."""
    memory = work.options.memory
    estimate = estimate_memory(work.opened.topology, batches, dense_batches, work.blocks.running)
    budget = None if memory is None else parse_size(memory)
    policy, note = choose_policy(estimate, budget, work.blocks.device, partial_path(output.folder))
    say(note, work.options.quiet)
    return policy
