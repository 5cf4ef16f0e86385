"""Which layers go, by measured KL, and what the layer before them does in their place.

Greedy: the layer without which the KL to the whole model is least goes first, then the next. What a run of
layers added to the residual stream is then given, as far as it is linear in that, to the linear before them
that writes into it (in the spirit of ReplaceMe, arXiv 2505.02819, whose map acts on that linear's output;
here it is regressed on the linear's inputs).
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from srcr.engine.forward import submodule
from srcr.models.blockwise import Arguments, BlockwiseModel
from srcr.models.matrices import read_matrix, replace_matrix
from srcr.models.topology import hidden_states
from srcr.numerics import moments
from srcr.numerics.elements import damped

#: Layers that are tried after the first, those that cost least alone.
CANDIDATES = 12
#: ``(done, of)``: passes through a block.
OnStep = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Rows:
    """Token ids [n, len] of each batch, the hidden states before the first block, what else every block is
    given, and the log probabilities [n, len, vocabulary] of the whole model."""

    ids: list[Tensor]
    hidden: list[Tensor]
    arguments: list[list[Arguments]]
    expected: list[Tensor]


def measured_rows(blocks: BlockwiseModel, batches: Sequence[Tensor]) -> Rows:
    """The batches as KL is measured on them."""
    hidden, arguments = embedded(blocks, batches)
    behind = _all_through(blocks, hidden, arguments)
    expected = [
        blocks.logits(ids, x).float().log_softmax(-1)
        for ids, x in zip(batches, behind, strict=True)
    ]
    return Rows(list(batches), hidden, arguments, expected)


def choose_layers(blocks: BlockwiseModel, rows: Rows, count: int, on_step: OnStep) -> list[int]:
    """The ``count`` blocks that go, in the order in which they were chosen."""
    total = len(blocks.topology.blocks)
    gone: list[int] = []
    candidates = list(range(total))
    done, of = 0, total + (count - 1) * total
    while len(gone) < count:
        losses = {}
        for index, loss in _without_each(blocks, rows, gone, candidates):
            losses[index] = loss
            done += 1
            on_step(min(done, of), of)
        best = sorted(losses, key=lambda index: (losses[index], index))
        gone.append(best[0])
        candidates = sorted(best[1 : 1 + max(CANDIDATES, count - len(gone))])
        done = len(gone) * total
    return gone


def _without_each(
    blocks: BlockwiseModel, rows: Rows, gone: Sequence[int], candidates: Sequence[int]
) -> Iterator[tuple[int, float]]:
    """The KL without each of the ``candidates`` beside what is ``gone``: all of them go through a block while
    it is loaded."""
    main = rows.hidden
    states: dict[int, list[Tensor]] = {}
    for index in range(len(blocks.topology.blocks)):
        if index in gone:
            continue
        module, others = blocks.block(index), [each[index] for each in rows.arguments]
        for candidate, hidden in states.items():
            states[candidate] = through(module, hidden, others)
        if index in candidates:
            states[index] = main
        main = through(module, main, others)
    for candidate, hidden in states.items():
        yield candidate, kl(blocks, rows, hidden)


def kl(blocks: BlockwiseModel, rows: Rows, hidden: Sequence[Tensor]) -> float:
    """Mean KL of the whole model's predictions and those of the hidden states behind the last block."""
    total, count = 0.0, 0
    for ids, expected, states in zip(rows.ids, rows.expected, hidden, strict=True):
        log = blocks.logits(ids, states).float().log_softmax(-1)
        total += float((expected.exp() * (expected - log)).sum(dtype=torch.float64))
        count += ids.numel()
    return total / count


def model_kl(whole: BlockwiseModel, rows: Rows, blocks: BlockwiseModel) -> float:
    """Mean KL of ``whole``, whose rows these are, and of another version of it."""
    return kl(whole, rows, _all_through(blocks, *embedded(blocks, rows.ids)))


def runs(gone: Collection[int]) -> list[tuple[int, int]]:
    """(first, last + 1) of each run of numbers without a gap."""
    numbers = sorted(gone)
    ends = [i for i, (a, b) in enumerate(pairwise(numbers), 1) if b != a + 1]
    edges = [0, *ends, len(numbers)]
    return [(numbers[a], numbers[b - 1] + 1) for a, b in pairwise(edges)] if numbers else []


def fold_layers(
    blocks: BlockwiseModel,
    batches: Sequence[Tensor],
    gone: Collection[int],
    dampening_frac: float,
) -> dict[str, Tensor]:
    """The weights [rows, cols], float32, of the linears that write into the residual stream before each run
    of blocks that are ``gone``, with what those added folded into them, by name. None for a run at the
    beginning."""
    before = {first - 1: (first, stop) for first, stop in runs(gone) if first > 0}
    states, arguments = embedded(blocks, batches)
    folded: dict[str, Tensor] = {}
    for index in range(max(before, default=-1) + 1):
        if index in gone:
            continue
        module, others = blocks.block(index), [each[index] for each in arguments]
        behind = through(module, states, others)
        if index in before:
            name = blocks.topology.blocks[index].groups[-1].names[-1]
            added = _added(blocks, behind, arguments, range(*before[index]))
            weight = _regressed(blocks, index, name, (states, others, added), dampening_frac)
            folded[name] = weight
            ref = blocks.topology.matrices[name]
            original = read_matrix(module, ref, blocks.topology.blocks[index].name)
            replace_matrix(module, ref, weight.to(original), blocks.topology.blocks[index].name)
            behind = through(module, states, others)
        states = behind
    return folded


def _added(
    blocks: BlockwiseModel,
    states: Sequence[Tensor],
    arguments: Sequence[list[Arguments]],
    run: range,
) -> list[Tensor]:
    """What a run of blocks adds to hidden states."""
    hidden = list(states)
    for index in run:
        hidden = through(blocks.block(index), hidden, [each[index] for each in arguments])
    return [x - y for x, y in zip(hidden, states, strict=True)]


def _regressed(
    blocks: BlockwiseModel,
    index: int,
    name: str,
    data: tuple[Sequence[Tensor], Sequence[Arguments], Sequence[Tensor]],
    dampening_frac: float,
) -> Tensor:
    """The weight of a linear with what is ``added`` regressed on its inputs: ``W + D^T X H^-1``. ``data``:
    hidden states before its block, what else that is given, and what is added behind it."""
    module, block = blocks.block(index), blocks.topology.blocks[index]
    W = read_matrix(module, blocks.topology.matrices[name], block.name).to(torch.float32)
    inputs: list[Tensor] = []
    handle = submodule(module, block, name).register_forward_pre_hook(
        lambda _, args: inputs.append(args[0])
    )
    H = torch.zeros(W.shape[1], W.shape[1], device=W.device)
    cross = torch.zeros(W.shape, device=W.device)
    for states, others, added in zip(*data, strict=True):
        through(module, [states], [others])
        x = inputs.pop().reshape(-1, W.shape[1])
        scales = moments.token_scales(x)
        y = added.reshape(-1, W.shape[0])
        x, y = (x, y) if scales is None else (x * scales, y * scales)
        moments.accumulate_gram(H, x)
        moments.accumulate(cross, y, x)
    handle.remove()
    moments.mirror_(H)
    factor = torch.linalg.cholesky(damped(H, dampening_frac))
    return W + torch.cholesky_solve(cross.T.to(torch.float64), factor).T.to(torch.float32)


def embedded(
    blocks: BlockwiseModel, batches: Sequence[Tensor]
) -> tuple[list[Tensor], list[list[Arguments]]]:
    """The hidden states before the first block for each batch, and what else every block is given."""
    pairs = list(blocks.embed(batches))
    return [hidden for hidden, _ in pairs], [arguments for _, arguments in pairs]


def _all_through(
    blocks: BlockwiseModel, states: Sequence[Tensor], arguments: Sequence[list[Arguments]]
) -> list[Tensor]:
    """Hidden states of each batch behind the last block."""
    hidden = list(states)
    for index in range(len(blocks.topology.blocks)):
        hidden = through(blocks.block(index), hidden, [each[index] for each in arguments])
    return hidden


def through(
    module: nn.Module, states: Sequence[Tensor], arguments: Sequence[Arguments]
) -> list[Tensor]:
    """Hidden states of each batch behind a block."""
    return [
        hidden_states(module(x, *args, **kwargs))
        for x, (args, kwargs) in zip(states, arguments, strict=True)
    ]
