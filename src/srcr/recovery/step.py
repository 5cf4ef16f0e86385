"""A step of distillation: the student's predictions against its teacher's, zeros and grid frozen."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from srcr.data.tokens import Batch, Tokens
from srcr.errors import NumericalError
from srcr.metrics.predictions import Predictions, pieces, predict, with_states
from srcr.plans.recovery import RecoverySpec
from srcr.recovery.losses import LOSSES, Loss, forward_kl
from srcr.recovery.processes import ALONE, Processes
from srcr.recovery.student import Student
from srcr.recovery.teacher import Teacher

#: Share of the steps in which learning rates rise.
RISE = 0.05
#: Tokens that go through the student together.
TOGETHER = 4096
#: Inputs of a layer whose learning rate is what a spec says.
WIDTH = 1024
#: For each row of a text the sum of its positions' KL and their number, [2, n].
KlSums = npt.NDArray[np.float64]
#: Decay rates of Adam's moments.
BETAS = (0.9, 0.95)


@dataclass(frozen=True, eq=False)
class Setting:
    """Who learns from whom, by what: the ``tokens`` to train on; the ``precision`` that matrices are
    multiplied in; how many tokens go through the student ``together``; the ``processes`` that share
    the rows."""

    student: Student
    teacher: Teacher
    tokens: Tokens
    spec: RecoverySpec
    precision: torch.dtype
    seed: int = 0
    together: int = TOGETHER
    processes: Processes = ALONE


def optimizer_of(student: Student, spec: RecoverySpec) -> torch.optim.AdamW:
    """The optimizer of everything that the spec trains, each group with its own learning rate."""
    groups: list[tuple[list[Tensor], float]] = []
    for latent in student.latents.values():
        # Wider rows add up more changes of one sign (arXiv 2203.03466, table 3).
        width = latent.steps.shape[1] / WIDTH
        if latent.compressed.grid is None:
            groups.append(([latent.steps], spec.value_lr / width))
            continue
        if spec.train == "codes":
            groups.append(([latent.steps], spec.lr / width))
        groups.append(([latent.log_gain], spec.scale_lr))
    for tensor in student.plain.values():
        size = float(tensor.latent.square().mean().sqrt()) or 1.0
        groups.append(([tensor.latent], spec.plain_lr * size))
    return torch.optim.AdamW(
        [{"params": tensors, "lr": lr, "peak": lr} for tensors, lr in groups if tensors],
        betas=BETAS,
        weight_decay=0.0,
        fused=True,
    )


def learning_rate(step: int, steps: int) -> float:
    """The share of their peak that learning rates have at a step: they rise, then fall as a cosine to 0."""
    rise = max(1, round(RISE * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def rows_of_step(step: int, batch: int, count: int, seed: int) -> list[int]:
    """The rows that a step trains on: each epoch takes all ``count`` rows in an order of its own."""
    orders: dict[int, list[int]] = {}

    def at(place: int) -> int:
        epoch, number = divmod(place, count)
        if epoch not in orders:
            orders[epoch] = np.random.default_rng((seed, epoch)).permutation(count).tolist()
        return orders[epoch][number]

    return [at(place) for place in range(step * batch, (step + 1) * batch)]


@dataclass(frozen=True)
class StepLoss:
    """The ``mean`` loss of a step, in nats, over so many ``tokens``."""

    mean: float
    tokens: int


def train_step(
    setting: Setting, optimizer: torch.optim.Optimizer, step: int, steps: int
) -> StepLoss:
    """The loss of a step that was made.

    Raises:
        NumericalError: the loss is not finite; nothing was changed.
    """
    rows = rows_of_step(step, setting.spec.batch, len(setting.tokens.input_ids), setting.seed)
    loss = accumulate(setting, rows)
    if not math.isfinite(loss.mean):
        raise NumericalError(f"the loss of step {step + 1} is not finite")
    update(setting.student, optimizer, learning_rate(step, steps))
    return loss


def update(student: Student, optimizer: torch.optim.Optimizer, share: float) -> None:
    """Change what stands behind the student's weights by their gradients, at a ``share`` of the peak learning
    rates, and the weights with it."""
    student.take_gradients()
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
    optimizer.step()
    student.drop_latent_gradients()
    student.clamp_()
    student.write()


def accumulate(setting: Setting, rows: list[int]) -> StepLoss:
    """The mean loss over ``rows``, whose gradients are left in the student's weights."""
    count = int((setting.tokens.row_lengths[rows] - 1).sum())
    mine = setting.processes.share(rows)
    loss = LOSSES[setting.spec.loss]
    total = torch.zeros((), dtype=torch.float64)
    for batch in _batches(setting.tokens, mine, setting.together):
        teacher = setting.teacher.predict(setting.tokens.sha256, batch)
        with torch.autocast(
            teacher.input_ids.device.type, setting.precision, setting.precision != torch.float32
        ):
            total += _backward(setting.student, teacher, loss, count)
    setting.processes.all_reduce_([total, *setting.student.gradients()])
    return StepLoss(float(total) / count, count)


def _batches(tokens: Tokens, rows: list[int], together: int) -> Iterator[Batch]:
    """The rows in batches of one length and at most ``together`` tokens, numbered as in ``tokens``."""
    selected = torch.tensor(rows, dtype=torch.int64)
    lengths = tokens.row_lengths[selected]
    for length in sorted(set(lengths.tolist()), reverse=True):
        same = selected[lengths == length]
        for part in torch.split(same, max(1, together // length)):
            yield Batch(part, tokens.input_ids[part, :length])


def _backward(student: Student, teacher: Predictions, loss: Loss, count: int) -> float:
    """Adds the gradients of a batch's loss, divided by ``count``; the sum of the loss over its positions.

    The logits of a piece of the positions at a time: only the gradient of what they are made of is kept.
    """
    ids = teacher.input_ids
    predictions = predict(student.model, ids, in_pieces=teacher.whole is None)
    source = predictions.whole
    if source is None:
        source = predictions.output.last_hidden_state
    leaf = source.detach().requires_grad_()
    if predictions.whole is not None:
        predictions = replace(predictions, whole=leaf)
    else:
        predictions = replace(predictions, output=with_states(predictions.output, leaf))
    total = 0.0
    for start, stop in pieces(student.model, ids):
        expected, given = _log_probabilities(teacher, predictions, start, stop)
        value = loss(expected, given).sum()
        (value / count).backward()  # type: ignore[no-untyped-call]
        total += float(value.detach())
    source.backward(leaf.grad)
    return total


def _log_probabilities(
    teacher: Predictions, student: Predictions, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        expected = teacher.logits(start, stop).float().log_softmax(-1)
    return expected, student.logits(start, stop).float().log_softmax(-1)


@torch.no_grad()
def held_out(
    student: Student, teacher: Teacher, tokens: Tokens, processes: Processes = ALONE
) -> KlSums:
    """For each row of ``tokens`` the sum of its positions' KL to the teacher and their number, [2, n]."""
    result = np.zeros((2, len(tokens.input_ids)))
    for batch in processes.share(list(tokens.batches(TOGETHER))):
        expected = teacher.predict(tokens.sha256, batch)
        given = predict(student.model, expected.input_ids, in_pieces=expected.whole is None)
        rows = batch.rows.numpy()
        for start, stop in pieces(student.model, expected.input_ids):
            part = forward_kl(*_log_probabilities(expected, given, start, stop))
            result[0, rows] += part.sum(-1, dtype=torch.float64).cpu().numpy()
            result[1, rows] += stop - start
    processes.all_reduce_([torch.from_numpy(result)])
    return result
