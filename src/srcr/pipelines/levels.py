"""Steps that sensitivity, plan and search share: a model and its texts, its level database, who measures."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from srcr.data.sources import calibration_request
from srcr.data.specs import CALIBRATION_SAMPLES, Calibration
from srcr.data.splits import search_sequences
from srcr.data.tokens import context_length
from srcr.engine.memory import (
    BATCH_TOKENS,
    MemoryPolicy,
    choose_policy,
    estimate_memory,
    token_batches,
)
from srcr.environment import parse_size, select_device
from srcr.errors import InputError
from srcr.formats import Format, get_format
from srcr.formats.checkpoint import planned_contents
from srcr.metrics.rates import FULL_BITS
from srcr.models.checkpoint import ModelLike, OpenModel
from srcr.pipelines.opening import (
    TextModel,
    open_with_bar,
    text_cache,
    writes_itself,
    writing_progress,
)
from srcr.pipelines.options import Output, RunOptions
from srcr.pipelines.progress import say, stage, tell
from srcr.pipelines.refusals import check_original, check_place
from srcr.planning.context import SearchContext, load_splits
from srcr.planning.costs import SizeBudget, check_reachable
from srcr.planning.database.build import (
    DatabaseBuilder,
    check_database_size,
    database_bytes,
    database_context,
    solve_here,
)
from srcr.planning.database.store import LevelDatabase
from srcr.planning.evaluators import Evaluator
from srcr.planning.evaluators.local import EvaluatorInputs, LocalEvaluator
from srcr.planning.evaluators.ray import RayEvaluator, check_ray, solve_on
from srcr.planning.memory import (
    SearchMemory,
    SearchPolicy,
    TextShape,
    choose_search_policy,
    estimate_search_memory,
)
from srcr.planning.objective import check_measurable, check_objective
from srcr.planning.space import SearchSpace
from srcr.planning.specs import MeasurementSpec, Resources, SearchSpec
from srcr.planning.structured import check_structures
from srcr.plans.objective import Constraint
from srcr.plans.plan import Target
from srcr.plans.specs import CompressionLevel

#: What a search writes where no format is named: zeros and widths are worth nothing in a dense checkpoint.
SEARCH_FORMAT = "compressed-tensors"
#: At most so many logits of each model does an evaluation make at a time.
EVALUATED_LOGITS = 1 << 26


def space_for(space: SearchSpace, fmt: Format, opened: OpenModel) -> SearchSpace:
    """The space with the group sizes and the scales of a format, where it says nothing of them.

    Raises:
        InputError: the format does not hold what the space's levels make of the model.
    """
    fmt.check_model(opened)
    shapes, quant = opened.topology.shapes, space.quant
    quant = replace(quant, scale_dtype=quant.scale_dtype or fmt.scale_dtype(opened.dtype))
    space = replace(
        space, quant=quant, group_sizes=fmt.group_sizes, super_blocks=fmt.super_blocks,
        common_widths=opened.topology.common_widths or None,
    )  # fmt: skip
    for bits in sorted({level.num_bits for level in space.levels} - {FULL_BITS}):
        level = CompressionLevel(0.0, bits)
        uniform = space.plan(dict.fromkeys(shapes, level), opened.topology, 0)
        fmt.check(planned_contents(uniform, opened))
    return space


def open_to_search(
    model: ModelLike,
    target: Target | Constraint,
    space: SearchSpace | None,
    output: Output,
    spec: SearchSpec,
    options: RunOptions,
) -> tuple[OpenModel, SearchSpace, str]:
    """The open model of a search, the levels of its format, and that format's name.

    Raises:
        InputError: as :func:`check_place` and :func:`space_for`; a target out of reach, an objective that
            finalists could not be compared by, a cluster that cannot be used.
    """
    fmt = get_format(output.format or SEARCH_FORMAT)
    objective = target.objective if isinstance(target, Constraint) else spec.objective
    check_objective(objective)
    check_place(output, model, options)
    check_original(model, options)
    opened = open_with_bar(model, options)
    space = space_for(space or SearchSpace(), fmt, opened)
    check_ray(spec.resources.ray, opened)
    check_measurable(objective, opened)
    if spec.structures and isinstance(target, Constraint):
        raise InputError("a search under a --constraint removes nothing whole: leave --remove out")
    check_structures(opened, space, spec.structures)
    if isinstance(target, Target):
        check_reachable(SizeBudget.of(target, opened.blockwise, space, fmt.name))
    return opened, space, fmt.name


def open_context(
    opened: OpenModel,
    space: SearchSpace,
    calibration: Calibration,
    measurement: MeasurementSpec | None,
    finalists: int,
    options: RunOptions,
) -> tuple[SearchContext, SearchPolicy]:
    """The model on its device, with the four parts of its text; and what the memory budget leaves for
    measuring candidates (None: nothing is measured) and for evaluating at most so many ``finalists``. It is
    asked before anything is loaded.

    Raises:
        InputError: the budget is too little (it names the smallest that is not); as
            :meth:`srcr.planning.space.SearchSpace.groups` and
            :func:`srcr.planning.context.load_splits`; an unknown device.
    """
    groups = space.groups(opened.topology)
    blocks = opened.blockwise.on(select_device(options.device))
    policy, base = SearchPolicy(0, 1), None
    if measurement is not None or writes_itself(calibration):
        measurement = measurement or MeasurementSpec()
        policy = _choose_memory(opened, calibration, measurement, finalists, options)
        base = opened.loaded(torch.float32)
    source = calibration_request(calibration, 0).name
    seed = options.seed or 0
    writer, aloud = TextModel(opened, blocks.device.type), list[str]()
    with stage("texts", 1, options.quiet) as bar:
        cache = text_cache(calibration_request(calibration, seed), writer, options, aloud.append)
        splits = load_splits(
            calibration, writer, opened.parameters, seed, writing_progress(bar, source), cache
        )
        bar.reach(1, f"{source}: {len(splits.calibration.input_ids)} sequences to calibrate, "
                  f"{len(splits.search.input_ids)} to search, to choose and to measure")  # fmt: skip
    for note in (*aloud, *splits.calibration.notes):
        say(note, options.quiet)
    return SearchContext(opened, blocks, splits, seed, groups, base), policy


def _choose_memory(
    opened: OpenModel,
    calibration: Calibration,
    measurement: MeasurementSpec,
    finalists: int,
    options: RunOptions,
) -> SearchPolicy:
    """What the memory budget leaves; a note where it should be said aloud."""
    need = _memory_needed(opened, calibration, measurement, finalists, options)
    policy, note = choose_search_policy(
        need, options.memory, select_device(options.device), measurement.cache_bytes, finalists
    )
    say(note, options.quiet)
    return policy


def choose_search_memory(
    opened: OpenModel, calibration: Calibration, spec: SearchSpec, options: RunOptions
) -> int:
    """Bytes that a search takes beside what the process has.

    Raises:
        InputError: more than its memory budget.
    """
    need = _memory_needed(opened, calibration, spec.measurement, spec.finalists, options)
    device, most = select_device(options.device), spec.measurement.cache_bytes
    choose_search_policy(need, options.memory, device, most, spec.finalists)
    return need.smallest


def _memory_needed(
    opened: OpenModel,
    calibration: Calibration,
    measurement: MeasurementSpec,
    finalists: int,
    options: RunOptions,
) -> SearchMemory:
    """What a search takes of memory, with so many finalists (0: nothing is evaluated)."""
    device = select_device(options.device)
    # What is out of range is refused with the text; here it must only be no less than a token.
    length = max(1, min(calibration.seq_len, context_length(opened.config) or calibration.seq_len))
    samples = max(1, calibration.samples or CALIBRATION_SAMPLES)
    text = torch.empty(samples, length, dtype=torch.int64, device="meta")
    batches = torch.split(text, max(1, BATCH_TOKENS // length))
    running = opened.blockwise.on(device).running
    compressing = estimate_memory(opened.topology, batches, len(batches), running)
    least = min(compressing.of(policy) for policy in (MemoryPolicy(), MemoryPolicy(0, Path())))
    measured = -(-search_sequences(opened.parameters) // measurement.batches)
    writing = TextModel(opened, device.type).precision if writes_itself(calibration) else None
    evaluated = max(1, min(BATCH_TOKENS, EVALUATED_LOGITS // opened.vocabulary) // length)
    shape = TextShape(length, writing, measured, evaluated)
    need = estimate_search_memory(opened, shape, least)
    return need if finalists else replace(need, finalist=0, evaluating=0)


def fill_database(
    context: SearchContext,
    space: SearchSpace,
    resources: Resources,
    default: Path,
    ray: Any,
    options: RunOptions,
) -> LevelDatabase:
    """The level database of a model (in the folder ``default`` where the resources name none), with every
    group at every level; what is there is not made again. Its size is said before it is built.

    Raises:
        InputError: it would be larger than allowed, or than the disk.
    """
    folder = Path(resources.database or default)
    needed = database_bytes(context.topology, space)
    folder.mkdir(parents=True, exist_ok=True)
    check_database_size(needed, resources.database_limit, shutil.disk_usage(folder).free)
    size = f"{len(context.groups)} groups at {len(space.levels)} levels"
    tell(f"level database: {size}, about {needed / 1e6:.1f} MB in {folder}", options.quiet)
    database = LevelDatabase(folder, database_context(space, context))
    batches = token_batches(context.splits.calibration)
    need = estimate_memory(context.topology, batches, 0, context.blocks.running)
    budget = None if options.memory is None else parse_size(options.memory)
    policy, note = choose_policy(need, budget, context.blocks.device, folder)
    say(note, options.quiet)
    blocks = context.topology.blocks
    steps = sum(len(block.groups) + 1 for block in blocks) - 1
    with stage("levels", steps, options.quiet) as bar:
        DatabaseBuilder(
            database,
            space,
            context.topology,
            context.blocks.dtype,
            lambda block, what: bar.note(f"block {block + 1}/{len(blocks)} {what}", advance=1),
            solve_here if ray is None else solve_on(ray),
        ).build(context.blocks, batches, policy)
        bar.reach(steps, size)
    return database


def open_evaluator(
    context: SearchContext, database: LevelDatabase, ray: Any, spec: MeasurementSpec
) -> Evaluator:
    """Who measures candidates: this process, or the workers of a cluster."""
    inputs = EvaluatorInputs(
        database.folder,
        database.context,
        context.groups,
        context.splits.search,
        context.device,
        spec,
    )
    if ray is None:
        return LocalEvaluator(inputs.candidates(context.opened))
    folder = context.opened.folder
    assert folder is not None, "checked before the work"
    return RayEvaluator(ray, folder, inputs)
