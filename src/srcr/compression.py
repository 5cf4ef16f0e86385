"""compress(): load, calibrate, walk the blocks, write, verify, record."""

import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from srcr import engine, progress
from srcr.budget import choose_room, needs
from srcr.calibration import Tokens, load_tokens
from srcr.card import model_card
from srcr.errors import InputError, NumericalError
from srcr.files import CARD, PLAN, RECORD
from srcr.formats import Format, get_format
from srcr.formats.checkpoint import (
    block_tensors,
    check_output,
    logits_fit,
    pack,
    partial_path,
    verify_block,
    verify_logits,
    whole_or_nothing,
    write_config,
    write_json,
)
from srcr.formats.journal import Journal
from srcr.memory import parse_size, peak, readable, resident
from srcr.methods import get_pruner, get_quantizer
from srcr.methods.joint import compress_unit
from srcr.metrics.rates import (
    count_zeros,
    entropy_bits,
    file_bytes,
    layer_tcr,
    mask_sparsity,
    planned_rates,
)
from srcr.models.load import load_model, load_tokenizer, resolve, sha256, weight_files
from srcr.models.topology import Topology, Unit
from srcr.models.weights import ModelWeights, open_weights
from srcr.numerics import masks
from srcr.numerics.hessian import is_finite
from srcr.types import (
    CompressedWeight,
    CompressionPlan,
    LayerPlan,
    LayerRecord,
    PruneSpec,
    QuantSpec,
    RunRecord,
    SweepSpec,
    from_dict,
    from_yaml,
    to_dict,
    to_yaml,
)

#: Group size taken where it divides a width and none was asked for.
AUTO_GROUP = 128
#: Tokens of calibration that go through a block at a time (docs/decisions/006).
BATCH_TOKENS = 4096


LOGITS_SKIPPED = (
    "logits were not compared through transformers, which would have taken more memory than compressing: "
    "every tensor was read back and compared"
)


@dataclass(frozen=True)
class Recipe:
    """The same treatment for every layer, as the command line names it."""

    prune: PruneSpec | None = None
    quant: QuantSpec | None = None
    sweep: SweepSpec = field(default_factory=SweepSpec)


@dataclass(frozen=True)
class Calibration:
    """Where calibration data comes from. ``samples`` None: 128 (or all of a shorter tensor file)."""

    source: str = "self"
    samples: int | None = None
    seq_len: int = 512


DEFAULT_SAMPLES = 128


@dataclass(frozen=True)
class Output:
    """Where the result goes. ``format`` None: compressed-tensors where it can hold the plan, else
    dense, said aloud. ``overwrite`` replaces an earlier result; ``resume`` continues a killed run of the
    same settings."""

    path: Path
    format: str | None = None
    overwrite: bool = False
    resume: bool = False


def uniform_plan(topology: Topology, recipe: Recipe) -> CompressionPlan:
    """The recipe, layer by layer."""
    layers = tuple(LayerPlan(name, recipe.prune, recipe.quant) for name in topology.shapes)
    return CompressionPlan(layers, sweep=recipe.sweep)


def settle_groups(plan: CompressionPlan, topology: Topology) -> tuple[CompressionPlan, str | None]:
    """The plan with every "auto" group size made explicit (128 where it divides the width, else -1),
    and a note that says how many became which."""
    layers = []
    sizes = []
    for layer in plan.layers:
        if layer.quant is not None and layer.quant.group_size == "auto":
            width = topology.shapes[layer.name][1]
            sizes.append(AUTO_GROUP if width % AUTO_GROUP == 0 else -1)
            layers.append(replace(layer, quant=replace(layer.quant, group_size=sizes[-1])))
        else:
            layers.append(layer)
    if not sizes:
        return plan, None
    note = (
        f"group size auto: {AUTO_GROUP} for {sizes.count(AUTO_GROUP)} of {len(sizes)} layers, channel-wise "
        f"for the {sizes.count(-1)} whose width it does not divide"
    )
    return replace(plan, layers=tuple(layers)), note


def check_plan(plan: CompressionPlan, topology: Topology) -> None:
    """Refuse a plan that does not fit the model, before any work is done.

    Raises:
        InputError: unknown or repeated layers, methods that do not exist, widths that a group size or
            an N:M pattern does not divide.
    """
    names = [layer.name for layer in plan.layers]
    unknown = [name for name in names if name not in topology.shapes]
    if unknown:
        raise InputError(
            f"the plan names {unknown[0]!r}, which is no linear layer of the model's blocks (they are "
            f"called like {next(iter(topology.shapes))!r})"
        )
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"the plan names {twice!r} twice")
    for layer in plan.layers:
        width = topology.shapes[layer.name][1]
        if layer.quant is not None:
            get_quantizer(layer.quant.method)
            size = layer.quant.group_size
            if isinstance(size, int) and size != -1 and width % size:
                raise InputError(
                    f"group size {size} does not divide the width {width} of {layer.name}: use a "
                    "divisor, -1 (channel-wise) or auto"
                )
        if layer.prune is not None:
            get_pruner(layer.prune.method)
            pattern = masks.parse_structure(layer.prune.mask_structure)
            if pattern and width % pattern[1]:
                raise InputError(
                    f"{layer.prune.mask_structure} sparsity needs widths that {pattern[1]} divides; "
                    f"{layer.name} has {width}: use another pattern or unstructured"
                )


def compress(
    model: str | Path,
    plan: CompressionPlan | Recipe,
    calibration: Calibration | Tokens,
    output: Output,
    seed: int | None = None,
    device: str = "auto",
    command: str = "",
    quiet: bool = False,
    memory: str | None = None,
) -> RunRecord:
    """Compress ``model`` (folder, hub id or "bundled") by ``plan`` into the folder ``output.path``.

    ``calibration`` is a source, or token ids that were loaded already; ``seed`` None is the plan's own (0 for
    a recipe); ``memory`` is a budget like "4GB" (None: half of what is free), on which the result does not
    depend.

    Returns the record that is also written there as ``srcr.json``. The folder appears only when it is
    whole and has been read back through transformers.

    Raises:
        InputError: anything about the model, plan, data or output folder that cannot be used.
        NumericalError: activations overflow, or a Hessian cannot be factorised.
        SrcrError: the disk refuses.
        VerificationError: what was written does not read back.
    """
    started = time.monotonic()
    folder = resolve(model)
    check_output(output.path, folder, output.overwrite, output.resume)
    if output.format is not None:
        get_format(output.format)
    budget = None if memory is None else parse_size(memory)
    where = pick_device(device)
    with progress.stage("load", 1, quiet) as bar:
        bar.note(str(model))
        source = open_weights(folder, where)
        bar.note(str(model), advance=1)
    if isinstance(plan, Recipe):
        plan = uniform_plan(source.topology, plan)
    check_plan(plan, source.topology)
    plan, note = settle_groups(plan, source.topology)
    plan = plan if seed is None else replace(plan, seed=seed)
    notes = [note] if note else []
    format_name, fmt = _pick_format(output.format, plan, source.topology, notes)
    for note in notes:
        if not quiet:
            progress.console().print(f"note: {note}")
    if isinstance(calibration, Tokens):
        tokens = calibration
    else:
        if calibration.source == "self" and source.stored and budget is not None:
            _check_whole(folder, budget, where)
        tokens = _calibrate(calibration, source, folder, plan.seed, where, quiet)
    base_sha256 = sha256(weight_files(folder))
    fingerprint = {
        "plan": plan.fingerprint(), "calibration": tokens.record()["sha256"], "base": base_sha256,
        "format": format_name, "device": where.type, "precision": str(source.running), **versions(),
    }  # fmt: skip
    if output.resume and (done := _already_done(output, fingerprint)):
        if not quiet:
            progress.console().print(f"already done: {output.path}")
        return done
    batches = torch.split(tokens.input_ids, max(1, BATCH_TOKENS // tokens.input_ids.shape[1]))
    widest = max(cols for _, cols in source.topology.shapes.values())
    dense = plan.sweep.dense_batches(len(batches), tokens.input_ids.numel(), widest)
    need = needs(source.topology, batches, dense, source.running)
    room, said = choose_room(need, budget, where, partial_path(output.path))
    if said and not quiet:
        progress.console().print(f"note: {said}")
    with whole_or_nothing(output.path, folder, output.overwrite, output.resume) as journal:
        journal.begin(fingerprint)
        if journal.entries and not quiet:
            progress.console().print(f"resumed: {len(journal.entries)} blocks were finished before")
        partial = journal.folder
        write_config(partial, folder, plan, source.topology, fmt)
        (partial / PLAN).write_text(to_yaml(plan), encoding="utf-8")
        layers = _walk(source, plan, batches, dense, room, fmt, journal, quiet)
        with progress.stage("write", 3, quiet) as bar:
            bar.note("weights")
            pack(journal, source)
            bar.note("verify", advance=1)
            if logits_fit(folder):
                verify_logits(partial, source, fmt)
            else:
                notes.append(LOGITS_SKIPPED)
            bar.note("record", advance=1)
            record = RunRecord(
                base=str(model),
                base_sha256=base_sha256,
                command=command,
                format=format_name,
                rates=planned_rates(
                    source.topology.shapes, layers, _untouched(source, layers), folder, partial,
                    fmt.loaded_bytes(partial),
                ),
                plan_fingerprint=plan.fingerprint(),
                calibration=tokens.record(),
                layers=tuple(layers),
                versions=versions(),
                seconds=round(time.monotonic() - started, 3),
                peak_memory_bytes=peak(),
                notes=tuple(notes),
            )  # fmt: skip
            write_json(partial / RECORD, to_dict(record))
            (partial / CARD).write_text(model_card(record, plan), encoding="utf-8")
            bar.note("done", advance=1)
    return record


def _check_whole(folder: Path, budget: int, device: torch.device) -> None:
    """Refuse to load a model whole that does not fit the budget.

    Raises:
        InputError: says how much it takes.
    """
    size = resident(device) + file_bytes(folder)
    if size > budget:
        raise InputError(
            f"--memory {readable(budget)} is too little for calibration 'self': the model writes it, and has "
            f"to be loaded whole for that; use at least {readable(1.02 * size)}, or another --calibration"
        )


def _already_done(output: Output, fingerprint: dict[str, str]) -> RunRecord | None:
    """The record of a finished OUT, where it is what this run would give.

    Raises:
        InputError: OUT is there, but was made otherwise.
    """
    if not (output.path / RECORD).is_file():
        return None
    record = from_yaml(RunRecord, output.path / RECORD)
    made = {
        "plan": record.plan_fingerprint, "calibration": record.calibration.get("sha256"),
        "base": record.base_sha256, "format": record.format,
    }  # fmt: skip
    differing = [key for key, value in made.items() if value != fingerprint[key]]
    if not differing:
        return record
    if output.overwrite:
        return None
    raise InputError(
        f"output {output.path} is finished, with another {' and '.join(differing)}: choose another name, "
        "or use --overwrite"
    )


def _untouched(source: ModelWeights, layers: Sequence[LayerRecord]) -> dict[str, float]:
    """The share of zeros in each linear that the plan leaves alone."""
    names = set(source.topology.shapes) - {layer.name for layer in layers}
    return {name: count_zeros([source.tensor(f"{name}.weight")]) for name in names}


def pick_device(device: str) -> torch.device:
    """The torch device for auto, cpu or cuda.

    Raises:
        InputError: unknown, or there is no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise InputError(f"device {device!r} is not known: use auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda' was asked for, but torch sees no GPU here: use cpu or auto")
    return torch.device(device)


def _pick_format(
    asked: str | None, plan: CompressionPlan, topology: Topology, notes: list[str]
) -> tuple[str, Format]:
    name = asked or "compressed-tensors"
    fmt = get_format(name)
    try:
        fmt.check(plan, topology)
    except InputError as error:
        if asked is not None:
            raise
        notes.append(f"format dense: {error}")
        return "dense", get_format("dense")
    return name, fmt


def _calibrate(
    calibration: Calibration,
    source: ModelWeights,
    folder: Path,
    seed: int,
    device: torch.device,
    quiet: bool,
) -> Tokens:
    with progress.stage("calibrate", 1, quiet) as bar:
        bar.note(calibration.source)
        model = source.model
        if calibration.source == "self":  # it has to write: all of it is needed
            model = load_model(folder).to(device) if source.stored else model.to(device)
        tokens = load_tokens(
            calibration.source, model, load_tokenizer(folder), calibration.samples,
            calibration.seq_len, seed, "calibration", DEFAULT_SAMPLES,
            lambda done, total: bar.reach(done / total, f"{calibration.source}: {done} tokens"),
        )  # fmt: skip
        if not source.stored:
            model.to("cpu")
        n, length = tokens.input_ids.shape
        bar.reach(1, f"{calibration.source}: {n} x {length} tokens")
    return tokens


@dataclass(frozen=True)
class _Watcher:
    """Moves the bar: one step a unit, named by its first linear."""

    bar: progress.Bar
    blocks: int
    errors: list[float]

    def step(self, block: int, what: str) -> None:
        error = f"  error {self.errors[-1]:.2e}" if self.errors else ""
        self.bar.note(f"block {block + 1}/{self.blocks} {what}{error}", advance=1)


def _walk(
    source: ModelWeights,
    plan: CompressionPlan,
    batches: Sequence[torch.Tensor],
    dense_batches: int,
    room: engine.Room,
    fmt: Format,
    journal: Journal,
    quiet: bool,
) -> list[LayerRecord]:
    """Compress block by block into the journal; what it holds already is taken over."""
    planned = plan.by_name()
    topology = source.topology
    steps = sum(len(block.units) + 1 for block in topology.blocks) - 1
    errors: list[float] = []

    def visit(view: engine.BlockView) -> list[LayerRecord]:
        if view.index < len(journal.entries):
            return _take_over(view, journal, fmt, topology)
        done: dict[str, CompressedWeight] = {}
        for unit in view.units:
            found = _compress_unit(view, unit, plan, planned, source.dtype)
            done |= found
            errors.extend(weight.error for weight in found.values())
            room.tidy()
        layers = [_layer(name, topology, planned[name], done[name], source.dtype) for name in done]
        tensors = block_tensors(source, view.index, done, fmt)
        path = journal.add(tensors, layers=[to_dict(layer) for layer in layers])
        verify_block(journal.folder, path, done, topology, fmt, source.dtype)
        return layers

    found: list[LayerRecord] = []
    with progress.stage("compress", steps, quiet) as bar:
        watcher = _Watcher(bar, len(topology.blocks), errors)
        for layers in engine.walk(source, batches, visit, watcher, dense_batches, room):
            found.extend(layers)
        bar.reach(steps, f"{len(topology.blocks)} blocks, {len(found)} layers")
    return found


def _compress_unit(
    view: engine.BlockView,
    unit: Unit,
    plan: CompressionPlan,
    planned: Mapping[str, LayerPlan],
    dtype: torch.dtype,
) -> dict[str, CompressedWeight]:
    """Compress the linears of a unit and put them into the modified block; by full name, in main memory."""
    full = {view.full_name(name): name for name in unit.names}
    plans = {name: planned.get(name, LayerPlan(name)) for name in full}
    if all(p.prune is None and p.quant is None for p in plans.values()):
        return {}
    weights = {name: view.weight(short) for name, short in full.items()}
    stats = view.statistics(unit, cross=plan.sweep.dense_targets).settle(weights)
    with named(next(iter(full))):
        found = compress_unit(weights, stats, plans, plan.sweep, dtype)
    for name, result in found.items():
        weight = result.dequantize()
        if not is_finite(weight):
            raise NumericalError(
                f"the compressed weights of {name} are not finite: its inputs overflow on this "
                "calibration data"
            )
        view.replace(full[name], weight)
    return {name: to_cpu(weight) for name, weight in found.items()}


def _take_over(
    view: engine.BlockView, journal: Journal, fmt: Format, topology: Topology
) -> list[LayerRecord]:
    """Put a block as an earlier run finished it."""
    entry = journal.entries[view.index]
    layers = [from_dict(LayerRecord, layer, str(journal.folder)) for layer in entry["layers"]]
    names, path = [layer.name for layer in layers], journal.file(view.index)
    for name, weight, _ in fmt.read(journal.folder, names, topology.conv1d, [path]):
        view.replace(name.removeprefix(f"{view.name}."), weight)
    return layers


def _layer(
    name: str, topology: Topology, plan: LayerPlan, weight: CompressedWeight, dtype: torch.dtype
) -> LayerRecord:
    sparsity = mask_sparsity(weight)
    return LayerRecord(
        name=name,
        shape=topology.shapes[name],
        sparsity=sparsity,
        bits=plan.bits,
        tcr=layer_tcr(sparsity, plan.bits),
        zeros=count_zeros([weight.dequantize().to(dtype)]),
        entropy_bits=entropy_bits(weight),
        error=weight.error,
    )


@contextmanager
def named(layer: str) -> Iterator[None]:
    """Put the layer's name in front of a numerical error."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(f"{layer}: {error}") from error


def to_cpu(weight: CompressedWeight) -> CompressedWeight:
    """The same weight with its tensors in main memory."""
    grid = weight.grid
    if grid is not None:
        zero = None if grid.zero_point is None else grid.zero_point.cpu()
        grid = type(grid)(grid.scale.cpu(), zero, grid.num_bits, grid.group_size, grid.dtype)
    mask, codes, values = (t if t is None else t.cpu() for t in
                           (weight.mask, weight.codes, weight.values))  # fmt: skip
    return CompressedWeight(mask, weight.error, codes, grid, values)


def versions() -> dict[str, str]:
    """Versions of what decides the result."""
    found = {"python": platform.python_version()}
    for package in ("srcr", "torch", "transformers", "compressed-tensors", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
