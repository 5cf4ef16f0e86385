"""Blocks tuned one after the other: each to give what the original's block gives, for the inputs that it
meets."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from srcr.data.tokens import Tokens
from srcr.models.blockwise import Arguments, BlockwiseModel
from srcr.models.topology import hidden_states
from srcr.numerics.moments import token_scales
from srcr.recovery.step import Setting, held_out, learning_rate, optimizer_of, update
from srcr.recovery.student import Student

#: Called after each block: its number, and KL on held-out text before and after it was tuned.
OnBlock = Callable[[int, float, float], None]


@dataclass(frozen=True, eq=False)
class BlockProblem:
    """A block's inputs in the student and outputs in the original, [n, len, width] each, with its other
    arguments, batch by batch."""

    inputs: Sequence[Tensor]
    targets: Sequence[Tensor]
    arguments: Sequence[Arguments]


def tune_blocks(
    setting: Setting,
    models: tuple[BlockwiseModel, BlockwiseModel],
    tokens: Tokens,
    held: Tokens,
    steps: int,
    on_block: OnBlock,
) -> list[bool]:
    """Whether each block was changed, in order: where the student's KL on ``held`` text falls by it.

    ``models``: the original and the student, through which ``tokens`` [n, len] go side by side.
    """
    original, same_student = models
    student, topology = setting.student, original.topology
    batches = [
        batch.input_ids for batch in tokens.batches(setting.spec.batch * tokens.input_ids.shape[1])
    ]
    embedded = list(original.embed(batches))
    dense = [hidden for hidden, _ in embedded]
    states = [hidden for hidden, _ in same_student.embed(batches)]
    best = _kl(setting, held)
    changed = []
    for index, block in enumerate(topology.blocks):
        arguments = [each[index] for _, each in embedded]
        targets = _run(original.block(index), dense, arguments)
        module = student.model.get_submodule(block.name)
        part = student.part(block.name)
        before = _saved(part)
        _tune(part, module, BlockProblem(states, targets, arguments), setting, steps)
        kl = _kl(setting, held)
        changed.append(kl < best)
        on_block(index, best, kl)
        if kl < best:
            best = kl
        else:
            _restore(part, before)
        states, dense = _run(module, states, arguments), targets
    return changed


def _tune(
    part: Student, module: torch.nn.Module, problem: BlockProblem, setting: Setting, steps: int
) -> None:
    """Train a block's weights by the squared difference of its outputs."""
    optimizer = optimizer_of(part, setting.spec)
    scales = [token_scales(y) for y in problem.targets]
    energy = sum(
        float(_scaled(y, s).square().mean()) for y, s in zip(problem.targets, scales, strict=True)
    )
    energy /= len(scales)
    for step in range(steps):
        number = step % len(problem.inputs)
        args, kwargs = problem.arguments[number]
        with _precision(setting, problem.inputs[number]):
            output = hidden_states(module(problem.inputs[number], *args, **kwargs))
        difference = _scaled(output - problem.targets[number], scales[number])
        (difference.square().mean() / energy).backward()  # type: ignore[no-untyped-call]
        update(part, optimizer, learning_rate(step, steps))


def _precision(setting: Setting, x: Tensor) -> torch.autocast:
    """Matrices are multiplied in what the setting says."""
    return torch.autocast(x.device.type, setting.precision, setting.precision != torch.float32)


def _scaled(x: Tensor, scales: Tensor | None) -> Tensor:
    return x if scales is None else x * scales.view(*x.shape[:-1], 1)


@torch.no_grad()
def _run(
    module: torch.nn.Module, states: Sequence[Tensor], arguments: Sequence[Arguments]
) -> list[Tensor]:
    """What a block gives for each batch."""
    return [
        hidden_states(module(x, *args, **kwargs))
        for x, (args, kwargs) in zip(states, arguments, strict=True)
    ]


def _kl(setting: Setting, held: Tokens) -> float:
    kl, tokens = held_out(setting.student, setting.teacher, held, setting.processes)
    return float(kl.sum() / tokens.sum())


def _saved(part: Student) -> list[Tensor]:
    return [tensor.clone() for tensor in _trained(part)]


@torch.no_grad()
def _restore(part: Student, saved: Sequence[Tensor]) -> None:
    for tensor, before in zip(_trained(part), saved, strict=True):
        tensor.copy_(before)
    part.write()


def _trained(part: Student) -> list[Tensor]:
    latents = [t for latent in part.latents.values() for t in (latent.steps, latent.log_gain)]
    return [*latents, *(tensor.latent for tensor in part.plain.values())]
