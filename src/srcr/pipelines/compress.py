"""compress(): open, resolve, calibrate, walk the blocks, write, verify, record."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

import torch

from srcr.data.specs import Calibration, Source
from srcr.data.tokens import Tokens
from srcr.engine.memory import token_batches
from srcr.environment import (
    peak_memory,
    versions,
)
from srcr.errors import InputError
from srcr.formats.checkpoint import Checkpoint
from srcr.formats.verify import (
    Verified,
    Walked,
    compare_logits,
    logits_fit,
    verify_logits,
    verify_tensors,
)
from srcr.metrics.rates import compressed_rates
from srcr.models.checkpoint import ModelLike
from srcr.numerics.paths import compute_paths
from srcr.pipelines.blocks import Streams, compress_blocks, journaled_checkpoint
from srcr.pipelines.embeddings import RoundedModel, round_embeddings
from srcr.pipelines.folder import write_records
from srcr.pipelines.options import Output, RunOptions
from srcr.pipelines.preparing import Work, choose_memory, count_dense_batches, planned, prepare
from srcr.pipelines.progress import say, stage, tell
from srcr.pipelines.removal import Setting, removal_method
from srcr.pipelines.store import BlockStore
from srcr.pipelines.structures import SmallerModel, drop_work, remove_structures
from srcr.pipelines.trained import measured_layers
from srcr.pipelines.training import (
    Recovery,
    Trained,
    Workplace,
    drop_state,
    train,
)
from srcr.plans.plan import CompressionPlan, Recipe
from srcr.plans.settings import RecipeSettings
from srcr.records.base_card import read_base_card
from srcr.records.routing import routing_notes
from srcr.records.run import LayerRecord, RunRecord
from srcr.serialize import digest, from_yaml
from srcr.storage.atomic import atomic_output
from srcr.storage.journal import Journal
from srcr.storage.layout import RECORD


@torch.no_grad()
def compress(
    model: ModelLike,
    output: Output | str | Path,
    plan: CompressionPlan | Recipe | None = None,
    calibration: Calibration | Tokens | Source = Calibration(),
    options: RunOptions = RunOptions(),
    recovery: Recovery | None = None,
    **settings: Unpack[RecipeSettings],
) -> RunRecord:
    """Compress ``model`` (a folder, a hub id, "bundled", a transformers model alone or with its tokenizer, or
    an open model) into the folder ``output``, by a ``plan`` or a recipe, or as ``settings`` say by the names
    of the command line (``sparsity=0.25, bits=4``; without any as it does without options).

    ``calibration``: a source by name or path, a list of strings, a ``datasets.Dataset``, token ids, or a
    ``DataLoader`` of them; or a :class:`Calibration`, which also says how much of it. ``recovery``: how the
    result is trained against the original before it is written. Returns the record, written there as
    ``srcr.json``; the folder appears when it is whole and has been read back.

    Raises:
        InputError: anything about the model, plan, data or output folder that cannot be used.
        NumericalError: activations overflow, or a Hessian cannot be factorised.
        SrcrError: the disk refuses.
        VerificationError: what was written does not read back.

    >>> compress("bundled", "small", sparsity=0.25, bits=4).rates.tcr
    0.8125
    """
    output = Output.of(output)
    plan = planned(plan, settings)
    work = prepare(model, plan, calibration, output, options, recovery)
    fingerprint = work.fingerprint()
    if output.resume and (record := _finished(output, fingerprint)):
        tell(f"already done: {output.folder}", options.quiet)
        return record
    batches = token_batches(work.tokens)
    dense_batches = count_dense_batches(work, batches)
    policy = choose_memory(work, batches, dense_batches, output)
    base = work.opened.folder
    with atomic_output(output.folder, base, output.overwrite, output.resume) as journal:
        journal.begin(fingerprint)
        if journal.entries:
            tell(f"resumed: {len(journal.entries)} blocks were finished before", options.quiet)
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
        store = BlockStore(journal, work.fmt)
        layers, walked = compress_blocks(
            streams, work.plan, batches, dense_batches, policy, store, options.quiet
        )
        finished = _Finished(work, smaller, rounded, layers, walked)
        return _write(_recovered(finished, journal), store)


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
    if record.recoveries:
        last = record.recoveries[-1]
        made |= {
            "training": digest(last.spec),
            "training text": last.text.sha256,
            "held-out text": last.held_out.sha256,
        }
    trained = ("training", "training text", "held-out text")
    keys = [*made, *(key for key in trained if key not in made)]
    differing = [key for key in keys if made.get(key) != fingerprint.get(key)]
    if not differing:
        return record
    if output.overwrite:
        return None
    raise InputError(
        f"output {output.folder} is finished, with another {' and '.join(differing)}: choose another name, "
        "or use --overwrite"
    )


@dataclass(frozen=True, eq=False)
class _Finished:
    """What a run has computed: the model without the structures that went (``smaller``), the same with its
    embeddings ``rounded``, a record of every compressed layer, and what the blocks gave for the first row;
    and what came of training, where there was any."""

    work: Work
    smaller: SmallerModel
    rounded: RoundedModel
    layers: list[LayerRecord]
    walked: Walked
    trained: Trained | None = None

    def files(self, journal: Journal) -> list[Path]:
        """Where the compressed weights lie."""
        return [*journal.files(), *([self.rounded.file] if self.rounded.file else [])]

    def checkpoint(self, journal: Journal) -> Checkpoint:
        """What is written: what training came to, else what compression did."""
        if self.trained is not None:
            return self.trained.checkpoint
        return journaled_checkpoint(
            self.smaller.opened, self.work.contents, journal.folder, self.files(journal)
        )


def _recovered(finished: _Finished, journal: Journal) -> _Finished:
    """The same after training, where that is asked for."""
    work = finished.work
    if work.recovery is None or work.texts is None:
        return finished
    checkpoint = finished.checkpoint(journal)
    place = Workplace(work.blocks.device, journal.folder, journal)
    trained = train(work.opened, checkpoint, work.recovery.spec, work.texts, place, work.options)
    say(trained.record.summary, work.options.quiet)
    return replace(
        finished, trained=trained, layers=measured_layers(finished.layers, trained.checkpoint)
    )


def _write(finished: _Finished, store: BlockStore) -> RunRecord:
    """Write the checkpoint from the journal, read it back, and record the run. Whatever a run needs to
    continue stays until the record is written."""
    work, journal, folder = finished.work, store.journal, store.journal.folder
    checkpoint = finished.checkpoint(journal)
    if finished.trained is None:
        checkpoint = store.moving(checkpoint)
    with stage("write", 3, work.options.quiet) as bar:
        bar.note("weights")
        work.fmt.write(checkpoint, folder)
        bar.note("verify", advance=1)
        verified_before = store.moved_names(checkpoint)
        written = verify_tensors(work.fmt, checkpoint, folder, verified_before)
        verified = _verified(finished, folder, written)
        bar.note("record", advance=1)
        record = write_records(folder, _record(finished, verified, folder), work.plan)
        for path in finished.files(journal):
            path.unlink()
        drop_work(folder)
        drop_state(folder)
        bar.note("done", advance=1)
    return record


def _verified(finished: _Finished, folder: Path, written: Checkpoint) -> Verified:
    """The logits of what was written beside those of the model as it was computed."""
    work, trained = finished.work, finished.trained
    if trained is not None:
        return compare_logits(work.fmt, folder, trained.ids, trained.logits)
    streamed = not logits_fit(finished.smaller.opened, work.blocks.running)
    return verify_logits(
        finished.rounded.opened, work.fmt, folder, written, finished.walked, streamed
    )


def _record(finished: _Finished, verified: Verified, folder: Path) -> RunRecord:
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
        verification=verified.verification,
        notes=(*work.notes, *routing_notes(finished.layers)),
        compute=compute_paths(work.blocks.device, work.blocks.running),
        structures=smaller.records or None,
        recoveries=None if finished.trained is None else (finished.trained.record,),
        probe=verified.probe,
        base_card=read_base_card(opened.folder),
    )
