"""compress(): load, calibrate, walk the blocks, write, verify, record."""

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from srcr import engine, progress
from srcr.calibration import Tokens, load_tokens
from srcr.card import model_card
from srcr.errors import InputError
from srcr.files import CARD, PLAN, RECORD
from srcr.formats import Format, get_format
from srcr.formats.checkpoint import (
    check_output,
    verify,
    whole_or_nothing,
    write_config,
    write_json,
    write_weights,
)
from srcr.methods import get_pruner, get_quantizer
from srcr.methods.joint import compress_unit
from srcr.metrics.rates import (
    count_zeros,
    entropy_bits,
    layer_tcr,
    mask_sparsity,
    planned_rates,
)
from srcr.models.load import load_model, load_tokenizer, resolve, sha256, weight_files
from srcr.models.topology import Topology
from srcr.models.weights import LoadedWeights
from srcr.numerics import masks
from srcr.types import (
    CompressedWeight,
    CompressionPlan,
    LayerPlan,
    LayerRecord,
    PruneSpec,
    QuantSpec,
    RunRecord,
    SweepSpec,
    to_dict,
    to_yaml,
)

#: Group size taken where it divides a width and none was asked for.
AUTO_GROUP = 128
#: Tokens of calibration that go through a block at a time.
BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Recipe:
    """The same treatment for every layer, as the command line names it."""

    prune: PruneSpec | None = None
    quant: QuantSpec | None = None
    sweep: SweepSpec = field(default_factory=SweepSpec)


@dataclass(frozen=True)
class Calibration:
    """Where calibration data comes from. ``samples`` None: 128 (or what a tensor file has)."""

    source: str = "self"
    samples: int | None = None
    seq_len: int = 512


DEFAULT_SAMPLES = 128


@dataclass(frozen=True)
class Output:
    """Where the result goes. ``format`` None: compressed-tensors where it can hold the plan, else
    dense, said aloud."""

    path: Path
    format: str | None = None
    overwrite: bool = False


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
    calibration: Calibration,
    output: Output,
    seed: int | None = None,
    device: str = "auto",
    command: str = "",
    quiet: bool = False,
) -> RunRecord:
    """Compress ``model`` (folder, hub id or "bundled") by ``plan`` into the folder ``output.path``.

    ``seed`` None is the plan's own (0 for a recipe).

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
    check_output(output.path, folder, output.overwrite)
    if output.format is not None:
        get_format(output.format)
    where = pick_device(device)
    base = load_model(folder)
    source = LoadedWeights(base, where)
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
    tokens = _calibrate(calibration, base, folder, plan.seed, where, quiet)
    dtype = source.dtype
    with whole_or_nothing(output.path, folder, output.overwrite) as partial:
        compressed = _walk(source, plan, tokens, quiet)
        with progress.stage("write", 3, quiet) as bar:
            bar.note("weights")
            write_weights(partial, base, source.topology, compressed, fmt, dtype)
            write_config(partial, folder, plan, source.topology, fmt)
            (partial / PLAN).write_text(to_yaml(plan), encoding="utf-8")
            bar.note("verify", advance=1)
            verify(partial, base, source.topology, compressed, fmt, dtype)
            bar.note("record", advance=1)
            record = _record(
                folder, str(model), partial, plan, compressed, format_name, fmt, source, tokens,
                command, time.monotonic() - started, tuple(notes),
            )  # fmt: skip
            write_json(partial / RECORD, to_dict(record))
            (partial / CARD).write_text(model_card(record, plan), encoding="utf-8")
            bar.note("done", advance=1)
    return record


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
    model: Any,
    folder: Path,
    seed: int,
    device: torch.device,
    quiet: bool,
) -> Tokens:
    with progress.stage("calibrate", 1, quiet) as bar:
        bar.note(calibration.source)
        home = model.device
        model.to(device)  # the model may have to write the text
        tokens = load_tokens(
            calibration.source, model, load_tokenizer(folder), calibration.samples,
            calibration.seq_len, seed, "calibration", DEFAULT_SAMPLES,
            lambda done, total: bar.reach(done / total, f"{calibration.source}: {done} tokens"),
        )  # fmt: skip
        model.to(home)
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
    source: LoadedWeights, plan: CompressionPlan, tokens: Tokens, quiet: bool
) -> dict[str, CompressedWeight]:
    planned = plan.by_name()
    length = tokens.input_ids.shape[1]
    batches = torch.split(tokens.input_ids, max(1, BATCH_TOKENS // length))
    blocks = source.topology.blocks
    steps = sum(len(block.units) + 1 for block in blocks) - 1
    errors: list[float] = []

    def visit(view: engine.BlockView) -> dict[str, CompressedWeight]:
        done: dict[str, CompressedWeight] = {}
        for unit in view.units:
            full = [view.full_name(name) for name in unit.names]
            plans = {name: planned.get(name, LayerPlan(name)) for name in full}
            if all(p.prune is None and p.quant is None for p in plans.values()):
                continue
            stats = view.statistics(unit, cross=plan.sweep.dense_targets)
            weights = {
                name: view.weight(short) for name, short in zip(full, unit.names, strict=True)
            }
            with named(full[0]):
                result = compress_unit(weights, stats, plans, plan.sweep, source.dtype)
            for name, short in zip(full, unit.names, strict=True):
                if name in result:
                    view.replace(short, result[name].dequantize())
                    errors.append(result[name].error)
            done.update({name: to_cpu(weight) for name, weight in result.items()})
        return done

    compressed: dict[str, CompressedWeight] = {}
    with progress.stage("compress", steps, quiet) as bar:
        watcher = _Watcher(bar, len(blocks), errors)
        dense_stream = plan.sweep.dense_targets
        for result in engine.walk(source, batches, visit, watcher, dense_stream):
            compressed.update(result)
        bar.reach(steps, f"{len(blocks)} blocks, {len(compressed)} layers")
    return compressed


@contextmanager
def named(layer: str) -> Iterator[None]:
    """Put the layer's name in front of a numerical error."""
    from srcr.errors import NumericalError

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


def _record(
    folder: Path,
    name: str,
    partial: Path,
    plan: CompressionPlan,
    compressed: dict[str, CompressedWeight],
    format_name: str,
    fmt: Format,
    source: LoadedWeights,
    tokens: Tokens,
    command: str,
    seconds: float,
    notes: tuple[str, ...],
) -> RunRecord:
    planned = plan.by_name()
    weights = {n: source.model.get_submodule(n).weight for n in source.topology.shapes}
    rates = planned_rates(
        plan, source.topology, compressed, count_zeros(weights.values()), folder, partial,
        fmt.loaded_bytes(partial),
    )  # fmt: skip
    layers = tuple(
        LayerRecord(
            name=n,
            shape=source.topology.shapes[n],
            sparsity=mask_sparsity(weight),
            bits=planned[n].bits,
            tcr=layer_tcr(mask_sparsity(weight), planned[n].bits),
            zeros=count_zeros([weights[n]]),
            entropy_bits=entropy_bits(weight),
            error=weight.error,
        )
        for n, weight in compressed.items()
    )
    return RunRecord(
        base=name,
        base_sha256=sha256(weight_files(folder)),
        command=command,
        format=format_name,
        rates=rates,
        plan_fingerprint=plan.fingerprint(),
        calibration=tokens.record(),
        layers=layers,
        versions=versions(),
        seconds=round(seconds, 3),
        peak_memory_bytes=progress.peak_memory(),
        notes=notes,
    )


def versions() -> dict[str, str]:
    """Versions of what decides the result."""
    found = {"python": platform.python_version()}
    for package in ("srcr", "torch", "transformers", "compressed-tensors", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
