"""Train a compressed model against its original, and keep what training came to where it is a gain."""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from srcr.data.sources import held_out_request, recovery_requests
from srcr.data.specs import RecoveryText
from srcr.data.splits import check_disjoint
from srcr.data.tokens import Tokens
from srcr.engine.activations import ActivationFile, HiddenStates
from srcr.environment import available_memory, format_megabytes, parse_size, resident_memory
from srcr.errors import InputError
from srcr.formats.checkpoint import Checkpoint
from srcr.metrics.intervals import ratio_interval
from srcr.metrics.predictions import has_pieces
from srcr.models.blockwise import copy_on, running_precision
from srcr.models.checkpoint import OpenModel, open_model
from srcr.pipelines.opening import TextModel, load_text
from srcr.pipelines.options import RunOptions
from srcr.pipelines.progress import Bar, say, stage
from srcr.pipelines.trained import trained_checkpoint
from srcr.plans.recovery import RecoverySpec
from srcr.records.recovery import RecoveryRecord
from srcr.recovery.blockwise import tune_blocks
from srcr.recovery.distill import Distillation, State
from srcr.recovery.latent import LatentWeight
from srcr.recovery.memory import training_memory
from srcr.recovery.processes import ALONE, Processes
from srcr.recovery.step import KlSums, Setting, held_out
from srcr.recovery.student import Student
from srcr.recovery.teacher import Teacher
from srcr.storage.journal import Journal
from srcr.storage.safetensors import TensorFiles, save_tensors

#: Where training stands, in the folder of a run.
STATE = "recovery.tensors"
#: Saving may take this share of the time between two savings.
SAVING_SHARE = 0.05
#: Rows that blocks are tuned on: their activations, before and behind a block, stay in memory.
BLOCK_ROWS = 128
#: Rows that the best state is chosen by, and that it is measured on, at least.
FEWEST = 2


@dataclass(frozen=True)
class Recovery:
    """A recovery that follows a compression: how and on what is trained.

    >>> Recovery(RecoverySpec(minutes=10)).text.sources
    ('self',)
    """

    spec: RecoverySpec
    text: RecoveryText = RecoveryText()


@dataclass(frozen=True, eq=False)
class Texts:
    """What is trained on, what the best state is chosen by, and what it is measured on."""

    train: Tokens
    choice: Tokens
    test: Tokens

    @property
    def held_out(self) -> Tokens:
        """All that is not trained on."""
        return Tokens.joined([self.choice, self.test])


@dataclass(frozen=True, eq=False)
class Workplace:
    """Where training goes on: on a ``device``, in a ``folder`` for what does not stay in memory, with a
    ``journal`` there (None: another process keeps it), among ``processes``."""

    device: torch.device
    folder: Path
    journal: Journal | None
    processes: Processes = ALONE


@dataclass(frozen=True, eq=False)
class Trained:
    """What came of a training: its record, the checkpoint (the one that was trained, where that was no gain),
    and for the token ids ``ids`` [1, len] the logits of its model."""

    record: RecoveryRecord
    checkpoint: Checkpoint
    ids: Tensor
    logits: Tensor


def load_texts(
    text: RecoveryText, opened: OpenModel, device: torch.device, options: RunOptions
) -> Texts:
    """The texts of a recovery, which share no sequence among training, choice and measurement.

    Raises:
        InputError: a source cannot be used, or is too short; two share a sequence.
    """
    seed, writer = options.seed or 0, TextModel(opened, device.type)
    parts = [
        load_text(request, writer, "text", options) for request in recovery_requests(text, seed)
    ]
    held = load_text(held_out_request(text, seed), writer, "held out", options)
    check_held_out(held)
    count = len(held.input_ids)
    halves = [list(range(0, count, 2)), list(range(1, count, 2))]
    texts = Texts(Tokens.joined(parts), *(held.select(half) for half in halves))
    check_disjoint([texts.train, texts.choice, texts.test])
    if held.source in [part.source for part in parts]:
        say(
            f"held-out text comes from {held.source}, as the text that is trained on: training on one "
            "source can cost elsewhere, which --held-out of another would show",
            options.quiet,
        )
    return texts


def check_held_out(held: Tokens) -> None:
    """Refuse too little text to choose and to measure by.

    Raises:
        InputError: says how much there is.
    """
    count = len(held.input_ids)
    if count < 2 * FEWEST:
        raise InputError(
            f"{held.source} gives {count} held-out sequences, and {2 * FEWEST} are needed: half to choose "
            "by, half to measure on; give more text, or a shorter --seq-len"
        )


@torch.enable_grad()
def train(
    opened: OpenModel,
    checkpoint: Checkpoint,
    spec: RecoverySpec,
    texts: Texts,
    place: Workplace,
    options: RunOptions,
) -> Trained:
    """Train the compressed weights of ``checkpoint``, norms and biases against the ``opened`` original.

    Raises:
        NumericalError: predictions are not finite before anything is trained.
        OSError: the disk refuses.
    """
    with (
        ActivationFile(place.folder, place.device) as states,
        stage("recover", 1, options.quiet or not place.processes.is_main) as bar,
    ):
        bar.note("load")
        setting = _setting(opened, checkpoint, spec, texts, place, states)
        setting = replace(setting, seed=options.seed or 0)
        student, test = setting.student, texts.test
        student.write()
        before = held_out(student, setting.teacher, test, place.processes)
        distillation, saver = Distillation(setting, texts.choice), _Saver(place)
        if not saver.take_up(distillation) and spec.stage != "distill":
            distillation.state.blocks = _tune_blocks(setting, texts, bar)
        best = distillation.run(_Watch(bar).on_step, saver.on_check)
        student.hold(best.weights, best.plain)
        after = held_out(student, setting.teacher, test, place.processes)
        record = _record(spec, texts, distillation.state, before, after)
        if not record.accepted:
            plain = {name: checkpoint.tensors.tensor(name) for name in student.plain}
            student.hold({name: checkpoint.read(name) for name in student.latents}, plain)
        ids = test.input_ids[:1, : int(test.row_lengths[0])]
        with torch.no_grad():
            logits = student.model(ids.to(place.device), use_cache=False).logits
    result = trained_checkpoint(checkpoint, best) if record.accepted else checkpoint
    return Trained(record, result, ids, logits)


def _setting(
    opened: OpenModel,
    checkpoint: Checkpoint,
    spec: RecoverySpec,
    texts: Texts,
    place: Workplace,
    states: HiddenStates,
) -> Setting:
    """The student and its teacher, both on the device."""
    model = copy_on(opened.loaded(torch.float32), place.device.type)
    teacher = Teacher(model, has_pieces(model, texts.choice.input_ids), states)
    student = make_student(opened, checkpoint, place.device)
    precision = running_precision(opened.dtype, place.device)
    return Setting(student, teacher, texts.train, spec, precision, processes=place.processes)


def _record(
    spec: RecoverySpec, texts: Texts, state: State, before: KlSums, after: KlSums
) -> RecoveryRecord:
    """The record of a training, whose gain has to be beyond doubt."""
    change = ratio_interval(after[0] - before[0], before[1])
    return RecoveryRecord(
        spec=spec,
        source=None,
        text=texts.train.record(),
        held_out=texts.held_out.record(),
        steps=state.step,
        best_step=state.best.step,
        tokens=state.tokens,
        seconds=round(state.seconds, 3),
        before=ratio_interval(*before),
        after=ratio_interval(*after),
        change=change,
        accepted=change.high < 0,
        curve=tuple(state.curve),
        stopped=state.stopped,
        blocks=None if state.blocks is None else tuple(state.blocks),
    )


def _tune_blocks(setting: Setting, texts: Texts, bar: Bar) -> list[bool]:
    """Which blocks were changed, each for itself, before everything is trained together."""
    original, student = (
        open_model(model).blockwise.on(setting.teacher.model.device)
        for model in (setting.teacher.model, setting.student.model)
    )
    count = len(original.topology.blocks)

    def on_block(index: int, before: float, after: float) -> None:
        kept = "" if after < before else ", left as it was"
        bar.note(f"block {index + 1}/{count} KL {before:.4f} to {after:.4f}{kept}")

    rows = list(range(min(BLOCK_ROWS, len(texts.train.input_ids))))
    tokens = texts.train.select(rows)
    steps = setting.spec.block_steps
    return tune_blocks(setting, (original, student), tokens, texts.choice, steps, on_block)


def check_stage(spec: RecoverySpec, opened: OpenModel, checkpoint: Checkpoint) -> None:
    """Refuse to tune blocks of which the original has others.

    Raises:
        InputError: says how many there are.
    """
    ours, theirs = (len(t.blocks) for t in (checkpoint.contents.topology, opened.topology))
    if spec.stage != "distill" and ours != theirs:
        raise InputError(
            f"stage {spec.stage} tunes blocks by the original's, which has {theirs}, and {ours} are left: "
            "use --stage distill"
        )


def check_memory(
    opened: OpenModel, spec: RecoverySpec, device: torch.device, options: RunOptions
) -> None:
    """Refuse a training that takes more memory than there is, or than it may take.

    Raises:
        InputError: says how much it takes.
    """
    linears = sum(rows * cols for rows, cols in opened.topology.shapes.values())
    needed = training_memory(opened.parameters, linears, spec.train)
    size = needed + resident_memory(torch.device("cpu"))
    if options.memory is not None and size > parse_size(options.memory):
        raise InputError(
            f"--memory {options.memory} is too little to train {opened.name} whole: use at least "
            f"{format_megabytes(1.02 * size)}"
        )
    if needed > available_memory(device):
        raise InputError(
            f"training {opened.name} takes {format_megabytes(needed)} beside activations, more than is free: "
            "use a machine with more memory, or train scales only (--train scales), which takes less"
        )


def make_student(opened: OpenModel, checkpoint: Checkpoint, device: torch.device) -> Student:
    """The model of a checkpoint in float32 on a device, with latent numbers behind its compressed weights.
    Where nothing was removed whole, they start as near to the original's as rounding allows."""
    topology = checkpoint.contents.topology
    same = dict(opened.topology.shapes) == dict(topology.shapes)
    latents = {}
    for name in topology.linears():
        if name not in checkpoint.contents.compressed:
            continue
        original = opened.blockwise.matrix(name).to(device, torch.float32) if same else None
        latents[name] = LatentWeight.of(checkpoint.read(name).to(device), original)
    model = checkpoint.dequantized(torch.float32).to(device)
    return Student.of(model, topology, latents, lambda name: checkpoint.meta(name).dtype)


@dataclass
class _Watch:
    """Shows on a bar of length 1 what training does."""

    bar: Bar
    started: float = field(default_factory=time.monotonic)

    def on_step(self, state: State) -> None:
        """After each step."""
        rate = state.tokens / max(state.seconds, 1e-9)
        loss = f" loss {state.losses[-1]:.3f}" if state.losses else ""
        of = "?" if state.steps is None else state.steps
        share = 0.0 if not state.steps else state.step / state.steps
        kl = f"KL {state.curve[0].kl:.3f} -> {state.best.kl:.3f}"
        self.bar.reach(share, f"{state.step}/{of} {kl}{loss} {rate:.0f} tok/s")


@dataclass
class _Saver:
    """Keeps where training stands in the folder of a run, as often as that costs little."""

    place: Workplace
    saved: float = field(default_factory=time.monotonic)
    cost: float = 0.0

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self.place.folder / STATE

    def take_up(self, distillation: Distillation) -> bool:
        """Go on where an earlier run was; whether there was one."""
        tensors: dict[str, Tensor] | None = None
        if self.path.is_file():
            files = TensorFiles(self.place.folder, [self.path])
            tensors = {name: files.get(name) for name in files.entries}
        tensors = self.place.processes.broadcast(tensors)
        if tensors is not None:
            distillation.restore(tensors, str(self.path))
        return tensors is not None

    def on_check(self, distillation: Distillation) -> None:
        """After a look at the held-out text."""
        started, journal = time.monotonic(), self.place.journal
        if journal is None or self.cost > SAVING_SHARE * (started - self.saved):
            return
        partial = self.path.with_name(self.path.name + ".partial")
        tensors = {name: t.cpu().contiguous() for name, t in distillation.tensors().items()}
        save_tensors(tensors, partial)
        partial.replace(self.path)
        journal.retain()
        self.saved = time.monotonic()
        self.cost = self.saved - started


def drop_state(folder: Path) -> None:
    """Remove what training has left in a folder."""
    for path in folder.glob(f"{STATE}*"):
        path.unlink()
