"""compress(): open, resolve, calibrate, walk the blocks, write, verify, record."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from srcr.data.sources import Calibration, Source, calibration_request
from srcr.data.token_ids import check_tokens
from srcr.data.tokens import Tokens, context_length
from srcr.engine.memory import MemoryPolicy, choose_policy, estimate_memory, token_batches
from srcr.environment import (
    format_megabytes,
    parse_size,
    peak_memory,
    resident_memory,
    select_device,
    versions,
)
from srcr.errors import InputError
from srcr.formats import Format, get_format
from srcr.formats.checkpoint import Contents, planned_contents
from srcr.formats.verify import Walked, logits_fit, verify_logits, verify_tensors
from srcr.metrics.rates import compressed_rates
from srcr.models.blockwise import BlockwiseModel
from srcr.models.checkpoint import ModelLike, OpenModel
from srcr.numerics.paths import compute_paths
from srcr.pipelines.blocks import Streams, compress_blocks, journaled_checkpoint
from srcr.pipelines.embeddings import RoundedModel, round_embeddings
from srcr.pipelines.notes import left_alone, left_out, quantized_already
from srcr.pipelines.opening import (
    TextModel,
    load_text,
    open_for,
    writes_itself,
    writing_memory,
)
from srcr.pipelines.options import Output, RunOptions
from srcr.pipelines.progress import console, say, stage
from srcr.pipelines.resolving import pick_format, resolve_plan, sizes_of_plan
from srcr.pipelines.structures import (
    Setting,
    SmallerModel,
    drop_work,
    removal_method,
    remove_structures,
)
from srcr.plans.plan import CompressionPlan, Recipe
from srcr.records.card import model_card
from srcr.records.run import LayerRecord, RunRecord, Verification
from srcr.serialize import from_yaml, to_json, to_yaml
from srcr.storage.atomic import atomic_output, partial_path
from srcr.storage.journal import Journal
from srcr.storage.layout import CARD, PLAN, RECORD
from srcr.structure.sizes import StructureSize, planned_smaller, resolved


@dataclass(frozen=True, eq=False)
class _Work:
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

    def fingerprint(self) -> dict[str, str]:
        """Everything that decides the result."""
        return {
            "plan": self.plan.fingerprint(),
            "calibration": self.tokens.sha256,
            "base": self.base_sha256,
            "format": self.fmt.name,
            "device": self.blocks.device.type,
            "precision": str(self.blocks.running),
            **versions(),
        }


@torch.no_grad()
def compress(
    model: ModelLike,
    plan: CompressionPlan | Recipe,
    calibration: Calibration | Tokens | Source,
    output: Output | str | Path,
    options: RunOptions = RunOptions(),
) -> RunRecord:
    """Compress ``model`` (a folder, a hub id, "bundled", a transformers model alone or with its tokenizer, or
    an open model) by ``plan`` into the folder ``output``. ``calibration``: a source by name, a list of
    strings, a ``datasets.Dataset``, or token ids; or a :class:`Calibration`, which also says how much of it.

    Returns the record that is also written there as ``srcr.json``. The folder appears only when it is whole
    and has been read back.

    Raises:
        InputError: anything about the model, plan, data or output folder that cannot be used.
        NumericalError: activations overflow, or a Hessian cannot be factorised.
        SrcrError: the disk refuses.
        VerificationError: what was written does not read back.

    >>> recipe = Recipe(PruneSpec(sparsity=0.25), QuantSpec(num_bits=4))
    >>> compress("bundled", recipe, "self", "small").rates.tcr
    0.8125
    """
    output = Output.of(output)
    work = _prepare(model, plan, calibration, output, options)
    fingerprint = work.fingerprint()
    if output.resume and (record := _finished(output, fingerprint)):
        if not options.quiet:
            console().print(f"already done: {output.folder}")
        return record
    batches = token_batches(work.tokens)
    dense_batches = _dense_batches(work, batches)
    policy = _choose_policy(work, batches, dense_batches, output)
    folder = work.opened.folder
    with atomic_output(output.folder, folder, output.overwrite, output.resume) as journal:
        journal.begin(fingerprint)
        if journal.entries and not options.quiet:
            console().print(f"resumed: {len(journal.entries)} blocks were finished before")
        setting = Setting(
            work.blocks, batches, dense_batches, policy, journal, fingerprint, options.quiet,
            removal_method(work.plan.solver),
        )  # fmt: skip
        smaller = remove_structures(work.opened, work.sizes, setting)
        rounded = round_embeddings(
            smaller.opened, work.plan, work.blocks.device, journal.folder, options.quiet
        )
        streams = Streams(
            *(each.blockwise.on(work.blocks.device) for each in (rounded.opened, smaller.opened))
        )
        layers, walked = compress_blocks(
            streams, work.plan, batches, dense_batches, policy, journal, options.quiet
        )
        return _write(_Finished(work, smaller, rounded, layers, walked), journal)


def _prepare(
    model: ModelLike,
    plan: CompressionPlan | Recipe,
    calibration: Calibration | Tokens | Source,
    output: Output,
    options: RunOptions,
) -> _Work:
    """Everything that can be refused, before any work is done: what is cheap to check first."""
    started = time.monotonic()
    if output.format is not None:
        get_format(output.format)
    device = select_device(options.device)
    budget = None if options.memory is None else parse_size(options.memory)
    opened = open_for(output, model, options)
    sizes = sizes_of_plan(plan, opened)
    smaller = planned_smaller(opened, sizes)
    plan, grouping = resolve_plan(plan, smaller.topology, options.seed)
    plan = replace(plan, structures=resolved(sizes) if sizes else None)
    contents = planned_contents(plan, smaller.topology)
    fmt, fallback = pick_format(output.format, contents)
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
    for note in notes:
        say(note, options.quiet)
    blocks = opened.blockwise.on(device)
    base_sha256 = _hash_weights(opened, options)
    if isinstance(calibration, Tokens):
        tokens = check_tokens(calibration, opened)
    else:
        calibration = Calibration.of(calibration)
        if budget is not None and writes_itself(calibration):
            _check_whole(opened, calibration, budget, device)
        request = calibration_request(calibration, plan.seed)
        tokens = load_text(request, TextModel(opened, device.type), "calibrate", options)
    notes = (*notes, *tokens.notes)
    return _Work(
        opened, blocks, base_sha256, sizes, plan, fmt, contents, tokens, notes, options, started
    )


def _hash_weights(opened: OpenModel, options: RunOptions) -> str:
    """The hash of the weights, each of which is checked on the way."""
    with stage("check", 1, options.quiet) as bar:
        bar.note("weights")
        sha256 = opened.sha256
        bar.note("weights", advance=1)
    return sha256


def _check_whole(
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


def _finished(output: Output, fingerprint: dict[str, str]) -> RunRecord | None:
    """The record of a finished OUT, where it is what this run would give.

    Raises:
        InputError: OUT is there, but was made otherwise.
    """
    if not (output.folder / RECORD).is_file():
        return None
    record = from_yaml(RunRecord, output.folder / RECORD)
    made = {
        "plan": record.plan_fingerprint,
        "calibration": record.calibration.sha256,
        "base": record.base_sha256,
        "format": record.format,
    }
    differing = [key for key, value in made.items() if value != fingerprint[key]]
    if not differing:
        return record
    if output.overwrite:
        return None
    raise InputError(
        f"output {output.folder} is finished, with another {' and '.join(differing)}: choose another name, "
        "or use --overwrite"
    )


def _dense_batches(work: _Work, batches: tuple[Tensor, ...]) -> int:
    """On how many of the batches the dense model runs as well."""
    widest = max(cols for _, cols in work.opened.topology.shapes.values())
    return work.plan.solver.dense_batches(len(batches), sum(ids.numel() for ids in batches), widest)


def _choose_policy(
    work: _Work, batches: tuple[Tensor, ...], dense_batches: int, output: Output
) -> MemoryPolicy:
    """How the walk uses the memory that it may take."""
    memory = work.options.memory
    estimate = estimate_memory(work.opened.topology, batches, dense_batches, work.blocks.running)
    budget = None if memory is None else parse_size(memory)
    policy, note = choose_policy(estimate, budget, work.blocks.device, partial_path(output.folder))
    say(note, work.options.quiet)
    return policy


@dataclass(frozen=True, eq=False)
class _Finished:
    """What a run has computed: the model without the structures that went (``smaller``), the same with its
    embeddings ``rounded``, a record of every compressed layer, and what the blocks gave for the first row."""

    work: _Work
    smaller: SmallerModel
    rounded: RoundedModel
    layers: list[LayerRecord]
    walked: Walked


def _write(finished: _Finished, journal: Journal) -> RunRecord:
    """Write the checkpoint from the journal, read it back, and record the run."""
    work, rounded, folder = finished.work, finished.rounded, journal.folder
    files = [*journal.files(), *([rounded.file] if rounded.file else [])]
    checkpoint = journaled_checkpoint(finished.smaller.opened, work.contents, folder, files)
    with stage("write", 3, work.options.quiet) as bar:
        bar.note("weights")
        work.fmt.write(checkpoint, folder)
        bar.note("verify", advance=1)
        written = verify_tensors(work.fmt, checkpoint, folder)
        streamed = not logits_fit(finished.smaller.opened, work.blocks.running)
        verification = verify_logits(
            rounded.opened, work.fmt, folder, written, finished.walked, streamed
        )
        bar.note("record", advance=1)
        for path in files:
            path.unlink()
        record = _record(finished, verification, folder)
        drop_work(folder)
        (folder / PLAN).write_text(to_yaml(work.plan), encoding="utf-8")
        (folder / RECORD).write_text(to_json(record), encoding="utf-8")
        (folder / CARD).write_text(model_card(record, work.plan), encoding="utf-8")
        bar.note("done", advance=1)
    return record


def _record(finished: _Finished, verification: Verification, folder: Path) -> RunRecord:
    work, opened, smaller = finished.work, finished.work.opened, finished.smaller
    loaded = work.fmt.loaded_bytes(folder, work.contents)
    return RunRecord(
        base=opened.name,
        base_sha256=work.base_sha256,
        command=work.options.command,
        format=work.fmt.name,
        rates=compressed_rates(opened, smaller.opened, finished.layers, folder, loaded),
        plan_fingerprint=work.plan.fingerprint(),
        calibration=work.tokens.record(),
        layers=tuple(finished.layers),
        embeddings=finished.rounded.records or None,
        loader=work.fmt.loader(work.contents),
        versions=versions(),
        seconds=round(time.monotonic() - work.started, 3),
        peak_memory_bytes=peak_memory(),
        verification=verification,
        notes=work.notes,
        compute=compute_paths(work.blocks.device, work.blocks.running),
        structures=smaller.records or None,
    )
