"""recover(): a compressed model is trained against its original, zeros and grid frozen; the format stays."""

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from srcr.data.specs import RecoveryText, Source, check_text
from srcr.environment import peak_memory, select_device, versions
from srcr.errors import InputError
from srcr.formats import Format, detect
from srcr.formats.checkpoint import Checkpoint
from srcr.formats.verify import compare_logits, verify_tensors
from srcr.models.blockwise import running_precision
from srcr.models.checkpoint import ModelLike, OpenModel
from srcr.models.load import load_tokenizer, resolve
from srcr.numerics.compressed import CompressedWeight
from srcr.numerics.paths import compute_paths
from srcr.pipelines.candidates import check_vocabulary
from srcr.pipelines.folder import read_records, write_records
from srcr.pipelines.opening import open_with_bar
from srcr.pipelines.options import Output, RunOptions
from srcr.pipelines.progress import say, stage, tell
from srcr.pipelines.refusals import check_order, check_place
from srcr.pipelines.trained import measured_layers
from srcr.pipelines.training import (
    Texts,
    Trained,
    Workplace,
    check_memory,
    check_stage,
    drop_state,
    load_texts,
    train,
)
from srcr.plans.plan import CompressionPlan
from srcr.plans.recovery import TEN_MINUTES, RecoverySpec
from srcr.records.run import LayerRecord, RunRecord
from srcr.recovery.processes import Processes, current_processes
from srcr.serialize import digest, from_yaml
from srcr.storage.atomic import atomic_output
from srcr.storage.index import stored_files
from srcr.storage.layout import CARD, EVALUATION, RECORD, REPORT, SEARCH
from srcr.storage.safetensors import hash_files

#: Files of a compressed model that say what it was, and not what training made of it.
OUTDATED = (RECORD, CARD, EVALUATION, REPORT, SEARCH)


@dataclass(frozen=True, eq=False)
class Trainable:
    """A compressed model that can be trained: its ``folder``, ``record``, ``plan``, format and
    ``checkpoint``, and the ``device`` that it is trained on."""

    folder: Path
    record: RunRecord
    plan: CompressionPlan
    fmt: Format
    checkpoint: Checkpoint
    device: torch.device


@dataclass(frozen=True, eq=False)
class _Work:
    """A recovery under way: the ``opened`` original, what is trained, on what and how."""

    opened: OpenModel
    student: Trainable
    texts: Texts
    spec: RecoverySpec
    options: RunOptions
    started: float

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Everything that decides the result."""
        return {
            "base": self.opened.sha256,
            "compressed model": hash_files(stored_files(self.student.folder)),
            "training": digest(self.spec),
            "plan": self.student.plan.fingerprint(),
            "text": self.texts.train.sha256,
            "held-out text": self.texts.held_out.sha256,
            "seed": str(self.options.seed or 0),
            "device": self.student.device.type,
            "precision": str(running_precision(self.opened.dtype, self.student.device)),
        }


def recover(
    base: ModelLike,
    compressed: str | Path,
    output: Output | str | Path,
    spec: RecoverySpec = TEN_MINUTES,
    text: RecoveryText | Source = RecoveryText(),
    options: RunOptions = RunOptions(),
) -> RunRecord:
    """Train the compressed model in the folder ``compressed`` against its original ``base`` (a folder, a
    hub id, "bundled", a transformers model, or an open model) by ``spec``, and write it into the folder
    ``output``: the same format, zeros, bits and bytes. ``text``: what it is trained on, a source by name or
    in memory as calibration's, or a :class:`RecoveryText`.

    Returns the record that is also written there. Where training is no gain beyond doubt on held-out text,
    the weight files are those of ``compressed``, and the record says so.

    Raises:
        InputError: a model, a text or the output folder cannot be used; ``compressed`` is no version of
            ``base``, was not made by srcr, or does not hold the codes of its weights.
        NumericalError: the models' predictions are not finite.
        SrcrError: the disk refuses.
        VerificationError: what was written does not read back.

    >>> recover("bundled", "small", "better", RecoverySpec(minutes=5)).recoveries[-1].accepted
    True
    """
    output = Output.of(output)
    processes = current_processes(select_device(options.device))
    if not processes.is_main:  # the main one has the output folder, and speaks
        options, output = replace(options, quiet=True), replace(output, resume=True)
    with processes.main_first():
        work = _prepare(base, compressed, output, spec, RecoveryText.of(text), options)
    known = _finished(output, work) if output.resume and processes.is_main else None
    if (known := processes.broadcast(known)) is not None:
        tell(f"already done: {output.folder}", options.quiet)
        return known
    if not processes.is_main:
        return _follow(work, processes)
    with atomic_output(
        output.folder, work.student.folder, output.overwrite, output.resume
    ) as journal:
        journal.begin(work.fingerprint | versions())
        place = Workplace(work.student.device, journal.folder, journal, processes)
        trained = train(work.opened, work.student.checkpoint, spec, work.texts, place, options)
        processes.leave()
        say(trained.record.summary, options.quiet)
        return _write(work, trained, journal.folder)


def _prepare(
    base: ModelLike,
    compressed: str | Path,
    output: Output,
    spec: RecoverySpec,
    text: RecoveryText,
    options: RunOptions,
) -> _Work:
    """Everything that can be refused, before any work is done."""
    started = time.monotonic()
    opened, student = open_trainable(base, compressed, output, spec, text, options)
    texts = load_texts(text, opened, student.device, options)
    work = _Work(opened, student, texts, spec, options, started)
    for note in _notes(work):
        say(note, options.quiet)
    return work


def open_trainable(
    base: ModelLike,
    compressed: str | Path,
    output: Output,
    spec: RecoverySpec,
    text: RecoveryText,
    options: RunOptions,
) -> tuple[OpenModel, Trainable]:
    """The open original and what is trained of its compressed version, checked against each other before any
    text is read."""
    if spec.steps is None and spec.minutes is None and spec.stage != "blockwise":
        raise InputError("a recovery needs an end: give steps or minutes")
    check_text(text)
    check_place(output, base, options)
    check_order(base, [compressed], "recover")
    device = select_device(options.device)
    folder = resolve(compressed)
    record, plan = read_records(folder)
    fmt = detect(folder)
    opened = open_with_bar(base, options)
    checkpoint = trainable(fmt.read(folder), plan, folder)
    check_vocabulary(opened, str(compressed), checkpoint.vocabulary, load_tokenizer(folder))
    check_memory(opened, spec, device, options)
    check_stage(spec, opened, checkpoint)
    return opened, Trainable(folder, record, plan, fmt, checkpoint, device)


def _follow(work: _Work, processes: Processes) -> RunRecord:
    """Train with the process that writes; the record of what is trained."""
    with tempfile.TemporaryDirectory() as folder:
        place = Workplace(work.student.device, Path(folder), None, processes)
        train(work.opened, work.student.checkpoint, work.spec, work.texts, place, work.options)
        processes.leave()
    return work.student.record


def trainable(checkpoint: Checkpoint, plan: CompressionPlan, folder: Path) -> Checkpoint:
    """A checkpoint as its format reads it, with the masks that its plan means: files do not tell a pruned
    weight from one that was rounded to 0, so in a pruned layer every zero is frozen. Of a dense checkpoint
    every linear is trained.

    Raises:
        InputError: it is quantized, but holds no codes.
    """
    layers = plan.by_name()
    pruned = {name for name, layer in layers.items() if layer.prune is not None}
    contents = checkpoint.contents
    for name, scheme in contents.schemes.items():
        if name in layers and layers[name].bits != scheme.num_bits:
            raise InputError(
                f"{folder} stores the {layers[name].bits}-bit codes of {name} in {scheme.num_bits} bits, so "
                "that training would leave their range: recover the checkpoint that it was exported from, or "
                "compress with --recover"
            )
    if contents.schemes:
        names = {*contents.compressed, *pruned}
        ordered = [*contents.topology.linears(), *contents.topology.embeddings]
        contents = replace(contents, compressed=tuple(name for name in ordered if name in names))
        return replace(checkpoint, contents=contents, read=_masked(_read_all(checkpoint), pruned))
    if any(layer.quant is not None for layer in plan.layers):
        raise InputError(
            f"{folder} holds dense weights of a quantized model, not the codes that training has to keep: "
            "compress the base again with --recover, or in a format with codes"
        )
    contents = replace(contents, schemes={}, compressed=tuple(contents.topology.linears()))
    return replace(checkpoint, contents=contents, read=_masked(_read_all(checkpoint), pruned))


def _read_all(checkpoint: Checkpoint) -> Callable[[str], CompressedWeight]:
    """Reads every linear of a checkpoint, those too that are stored as plain tensors."""
    contents, dtype = checkpoint.contents, checkpoint.dtype

    def read(name: str) -> CompressedWeight:
        if name in contents.schemes:
            return checkpoint.read(name)
        ref = contents.topology.matrix(name)
        values = ref.view(checkpoint.tensors.tensor(ref.parameter)).to(dtype).contiguous()
        return CompressedWeight(None, float("nan"), values=values)

    return read


def _masked(
    read: Callable[[str], CompressedWeight], pruned: set[str]
) -> Callable[[str], CompressedWeight]:
    def masked(name: str) -> CompressedWeight:
        weight = read(name)
        if weight.mask is not None or name not in pruned:
            return weight
        return replace(weight, mask=weight.dequantize() != 0)

    return masked


def _finished(output: Output, work: _Work) -> RunRecord | None:
    """The record of a finished OUT, where it is what this run would give.

    Raises:
        InputError: OUT is there, but was made otherwise.
    """
    if not (output.folder / RECORD).is_file():
        return None
    record = from_yaml(RunRecord, output.folder / RECORD)
    last = record.recoveries[-1] if record.recoveries else None
    if last is not None and last.fingerprint == digest(work.fingerprint):
        return record
    if output.overwrite:
        return None
    raise InputError(
        f"output {output.folder} is finished, and not what this recovery gives: choose another name, or use "
        "--overwrite"
    )


def _write(work: _Work, trained: Trained, folder: Path) -> RunRecord:
    """Write what training came to, or what it began with, and record it."""
    with stage("write", 2, work.options.quiet) as bar:
        bar.note("weights")
        drop_state(folder)
        if trained.record.accepted:
            work.student.fmt.write(trained.checkpoint, folder)
            bar.note("verify", advance=1)
            verify_tensors(work.student.fmt, trained.checkpoint, folder)
        else:
            _copy(work.student.folder, folder)
        verified = compare_logits(work.student.fmt, folder, trained.ids, trained.logits)
        record = replace(
            _updated(work.student.record, trained.checkpoint, _linear_weights(work.opened)),
            command=work.options.command,
            versions=versions(),
            seconds=round(time.monotonic() - work.started, 3),
            peak_memory_bytes=peak_memory(),
            verification=verified.verification,
            probe=verified.probe,
            compute=compute_paths(work.student.device, torch.float32),
            notes=(*work.student.record.notes, *_notes(work)),
        )
        recovery = replace(
            trained.record, source=work.student.folder.name, fingerprint=digest(work.fingerprint)
        )
        record = replace(record, recoveries=(*(work.student.record.recoveries or ()), recovery))
        record = write_records(folder, record, work.student.plan)
        bar.note("done", advance=1)
    return record


def _linear_weights(opened: OpenModel) -> int:
    return sum(rows * cols for rows, cols in opened.topology.shapes.values())


def _notes(work: _Work) -> list[str]:
    """What people should know of the models."""
    if work.opened.sha256 == work.student.record.base_sha256:
        return []
    return [
        f"trained against {work.opened.name}, which by its hash is not the file that was compressed: another "
        "model, or the same in other files"
    ]


def _copy(source: Path, folder: Path) -> None:
    """Every file of a compressed model, but those that speak of what it was."""
    for path in source.iterdir():
        if path.is_file() and path.name not in OUTDATED:
            shutil.copyfile(path, folder / path.name)


def _updated(record: RunRecord, checkpoint: Checkpoint, total: int) -> RunRecord:
    """The record of a compression with the zeros and the entropy of what training came to: sparsity, bits and
    bytes are as they were. ``total``: weights of the original's linears."""
    rates, layers = record.rates, measured_layers(record.layers, checkpoint)
    present = sum(rows * cols for rows, cols in checkpoint.contents.topology.shapes.values())
    zeros = sum(_change(record.layers, layers, "zeros")) / present
    entropy = rates.entropy_bits
    if entropy is not None:
        entropy += sum(_change(record.layers, layers, "entropy_bits")) / total
    rates = replace(rates, zeros=rates.zeros + zeros, entropy_bits=entropy)
    return replace(record, layers=tuple(layers), rates=rates)


def _change(before: Sequence[LayerRecord], after: Sequence[LayerRecord], what: str) -> list[float]:
    """By how much a figure of each layer changed, times its size."""
    return [
        math.prod(old.shape) * (getattr(new, what) - getattr(old, what))
        for old, new in zip(before, after, strict=True)
    ]
