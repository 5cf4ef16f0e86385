"""What a command would come to: everything that it refuses is refused here too, and nothing of it is
computed."""

import shutil
from collections import Counter
from pathlib import Path

from srcr.data.sources import recovery_requests
from srcr.data.specs import Calibration, RecoveryText, Source, check_calibration, check_text
from srcr.data.tokens import Tokens
from srcr.engine.memory import choose_policy, estimate_memory
from srcr.environment import available_memory, parse_size, resident_memory, select_device
from srcr.formats import Format
from srcr.formats.checkpoint import Contents
from srcr.metrics.rates import FULL_BITS, layer_tcr, mean_rates
from srcr.models.checkpoint import ModelLike, OpenModel
from srcr.pipelines.duration import files_seconds
from srcr.pipelines.levels import choose_search_memory, open_to_search
from srcr.pipelines.opening import TextModel, writes_itself, writing_memory
from srcr.pipelines.options import Output, RunOptions
from srcr.pipelines.preparing import Setup, check_whole, set_up
from srcr.pipelines.recover import open_trainable
from srcr.pipelines.run_time import compression_time, recovery_time, search_time, stopwatch
from srcr.pipelines.text_size import asked_text, empty_batches, row_length, text_size
from srcr.pipelines.training import Recovery, check_memory, check_stage
from srcr.planning.costs import HEADER_BYTES, entry_bytes
from srcr.planning.database.build import check_database_size, database_bytes
from srcr.planning.space import SearchSpace
from srcr.planning.specs import SearchSpec
from srcr.plans.objective import Constraint
from srcr.plans.plan import CompressionPlan, Recipe, Target
from srcr.plans.recovery import TEN_MINUTES, RecoverySpec
from srcr.records.preview import Preview
from srcr.recovery.memory import training_memory
from srcr.storage.atomic import partial_path
from srcr.storage.index import file_bytes

#: Bytes of a float32.
FLOAT = 4
#: Numbers that training keeps on disk of each that it trains: itself, two moments; and a byte of its code.
SAVED_NUMBERS, SAVED_CODE = 3, 1


def preview_compression(
    model: ModelLike,
    output: Output | str | Path,
    plan: CompressionPlan | Recipe,
    calibration: Calibration | Tokens | Source = Calibration(),
    options: RunOptions = RunOptions(),
    recovery: Recovery | None = None,
) -> Preview:
    """What :func:`srcr.compress` would come to.

    Raises:
        InputError: what it refuses before it reads the model, or its text.

    >>> preview_compression("bundled", "small", Recipe(PruneSpec(sparsity=0.25), QuantSpec())).tcr
    0.8125
    """
    output = Output.of(output)
    check_calibration(calibration)
    setup = set_up(model, plan, output, options, recovery)
    opened, plan = setup.opened, setup.plan
    batches = empty_batches(calibration, opened)
    dense = plan.solver.dense_batches(
        len(batches),
        sum(ids.numel() for ids in batches),
        max(cols for _, cols in opened.topology.shapes.values()),
    )
    running = opened.blockwise.on(setup.device).running
    estimate = estimate_memory(opened.topology, batches, dense, running)
    budget = None if options.memory is None else parse_size(options.memory)
    text = asked_text(calibration)
    memory = 0
    if isinstance(text, Calibration) and writes_itself(text):
        if budget is not None:
            check_whole(opened, text, budget, setup.device)
        memory = writing_memory(TextModel(opened, setup.device.type), row_length(text, opened))
    policy, note = choose_policy(estimate, budget, setup.device, partial_path(output.folder))
    memory = max(memory, estimate.of(policy))
    if recovery is not None:
        memory = max(memory, _training_bytes(opened, recovery.spec))
    stored, loaded = planned_bytes(setup.smaller, setup.contents, setup.fmt)
    work = _journal_bytes(setup)
    if policy.activation_folder is not None:
        work += (len(batches) + dense) * estimate.states
    if recovery is not None:
        work += _state_bytes(opened)
    sparsity, bits, tcr = _planned_rates(setup)
    return Preview(
        "compress", opened.name, setup.fmt.name, opened.weight_bytes, stored, loaded,
        resident_memory(setup.device) + memory, available_memory(setup.device),
        stored + work, _free_disk(output.folder), text_size(calibration, batches),
        tcr, sparsity, bits, _group_sizes(plan),
        (*setup.notes, *([note] if note else [])),
        compression_time(setup, calibration, recovery, batches, dense, stored),
    )  # fmt: skip


def preview_search(
    model: ModelLike,
    target: Target | Constraint,
    space: SearchSpace | None,
    calibration: Calibration | Source,
    output: Output,
    spec: SearchSpec = SearchSpec(),
    options: RunOptions = RunOptions(),
) -> Preview:
    """What :func:`srcr.search` would come to.

    Raises:
        InputError: what it refuses before it reads the model, or its text.

    >>> preview_search("bundled", Target(tcr=0.8125), None, "self", Output("best")).tcr
    0.8125
    """
    calibration = Calibration.of(calibration)
    check_text(calibration)
    opened, space, name = open_to_search(model, target, space, output, spec, options)
    memory = choose_search_memory(opened, calibration, spec, options)
    if spec.recovery is not None:
        check_memory(opened, spec.recovery, select_device(options.device), options)
        memory = max(memory, _training_bytes(opened, spec.recovery))
    folder, free = output.folder, _free_disk(output.folder)
    database = database_bytes(opened.topology, space)
    check_database_size(database, spec.resources.database_limit, free)
    stored = target.stored_bytes if isinstance(target, Target) else None
    finalists = spec.finalists * (stored or opened.weight_bytes)
    device = select_device(options.device)
    groups = len(space.groups(opened.topology))
    return Preview(
        "search", opened.name, name, opened.weight_bytes, stored,
        target.loaded_bytes if isinstance(target, Target) else None,
        resident_memory(device) + memory, available_memory(device), database + finalists, free,
        text_size(calibration, empty_batches(calibration, opened)),
        target.tcr if isinstance(target, Target) else None,
        notes=(
            f"{groups} groups at {len(space.levels)} levels: a level database of about "
            f"{database / 1e6:.1f} MB in {spec.resources.database or partial_path(folder)}",
            f"{spec.trials} candidates measured, at most {spec.finalists} finalists compressed again",
        ),
        seconds=search_time(opened, target, space, calibration, spec, device),
    )  # fmt: skip


def preview_recovery(
    base: ModelLike,
    compressed: str | Path,
    output: Output,
    spec: RecoverySpec = TEN_MINUTES,
    text: RecoveryText | Source = RecoveryText(),
    options: RunOptions = RunOptions(),
) -> Preview:
    """What :func:`srcr.recover` would come to.

    Raises:
        InputError: what it refuses before it reads the original, or its text.

    >>> preview_recovery("bundled", "small", Output("better")).tcr
    0.8125
    """
    text = RecoveryText.of(text)
    opened, trained = open_trainable(base, compressed, output, spec, text, options)
    check_stage(spec, opened, trained.checkpoint)
    device = select_device(options.device)
    memory = resident_memory(device) + _training_bytes(opened, spec)
    stored, rates = file_bytes(trained.folder), trained.record.rates
    asked = [request.samples or request.default_samples for request in recovery_requests(text, 0)]
    names = ", ".join(request.name for request in recovery_requests(text, 0))
    return Preview(
        "recover", opened.name, trained.fmt.name, opened.weight_bytes, stored, rates.loaded_bytes,
        memory, available_memory(device), stored + _state_bytes(opened), _free_disk(output.folder),
        f"{names}: at most {sum(asked)} x {row_length(text, opened)} tokens",
        rates.tcr, rates.sparsity, rates.bits, _group_sizes(trained.plan),
        seconds=recovery_time(stopwatch(opened, device), spec, text)
        + files_seconds(opened.weight_bytes + stored, stored),
    )  # fmt: skip


def planned_bytes(opened: OpenModel, contents: Contents, fmt: Format) -> tuple[int, int | None]:
    """About how many bytes the weight files of a checkpoint take, and its tensors in memory (None: the format
    is unpacked before it runs)."""
    topology, model = opened.topology, opened.blockwise
    coded = {topology.matrix(name).parameter for name in contents.schemes}
    tensors = {name: model.meta(name) for name in model.names() if name not in coded}
    for name, scheme in contents.schemes.items():
        ref, shape = topology.matrix(name), topology.shape(name)
        tensors |= fmt.layout(ref, shape, scheme, model.dtype)
    size = sum(tensor.nbytes for tensor in tensors.values())
    entries = sum(entry_bytes(name, tensor, size) for name, tensor in tensors.items())
    return size + HEADER_BYTES + entries, None if fmt.name == "archive" else size


def _planned_rates(setup: Setup) -> tuple[float, float, float]:
    """(sparsity, bits, TCr) against the original, as :func:`srcr.metrics.rates.compressed_rates` counts."""
    planned = setup.plan.by_name()
    rows = []
    for name, (height, width) in setup.smaller.topology.shapes.items():
        layer = planned.get(name)
        bits = FULL_BITS if layer is None else layer.bits
        rows.append((height * width, 0.0 if layer is None else layer.sparsity, bits))
    total = sum(height * width for height, width in setup.opened.topology.shapes.values())
    left = sum(size for size, _, _ in rows) / total
    sparsity, mean_bits, _ = mean_rates(rows)
    tcr = sum(size * layer_tcr(s, q) for size, s, q in rows) / total + 1 - left
    return 1 - left * (1 - sparsity), mean_bits, tcr


def _group_sizes(plan: CompressionPlan) -> dict[str, int]:
    layers = (*plan.layers, *(plan.embeddings or ()))
    return dict(Counter(str(layer.quant.group_size) for layer in layers if layer.quant))


def _journal_bytes(setup: Setup) -> int:
    """Finished blocks as the journal keeps them: codes or values, masks, scales."""
    planned, size = setup.plan.by_name(), 0.0
    for name, (rows, cols) in setup.smaller.topology.shapes.items():
        layer = planned.get(name)
        if layer is None or (layer.prune is None and layer.quant is None):
            continue
        size += rows * cols * (layer.bits + (layer.prune is not None)) / 8
        if layer.quant is not None and isinstance(layer.quant.group_size, int):
            group = cols if layer.quant.group_size == -1 else layer.quant.group_size
            size += FLOAT * rows * cols / group
    return int(size)


def _training_bytes(opened: OpenModel, spec: RecoverySpec) -> int:
    linears = sum(rows * cols for rows, cols in opened.topology.shapes.values())
    return training_memory(opened.parameters, linears, spec.train)


def _state_bytes(opened: OpenModel) -> int:
    """Where training stands, as it is kept on disk."""
    linears = sum(rows * cols for rows, cols in opened.topology.shapes.values())
    return (SAVED_NUMBERS * FLOAT + SAVED_CODE) * linears


def _free_disk(folder: Path) -> int:
    """Bytes that are free where a folder will be."""
    return shutil.disk_usage(next(p for p in folder.resolve().parents if p.exists())).free
