"""What a walk over the blocks takes, estimated from shapes, and how it fits into a memory budget.

Results do not depend on the budget: it decides how many forward passes are cached within a block (the others
are begun again for every group), and whether hidden states lie on disk between blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from srcr.data.tokens import Tokens
from srcr.environment import (
    available_memory,
    format_megabytes,
    release_memory,
    resident_memory,
)
from srcr.errors import InputError
from srcr.models.topology import Block, Topology
from srcr.numerics.kernels.dispatch import kernels_for
from srcr.solver.problem import STACKED_ELEMENTS

#: Tokens of calibration that go through a block at a time (docs/decisions/006).
BATCH_TOKENS = 4096
#: The share of the free memory that a run may take where no budget is given: the rest is others'.
DEFAULT_SHARE = 0.5
#: Bytes of a float32.
FLOAT = 4
#: What allocators and libraries keep besides, in bytes, measured.
SLACK = 100_000_000
#: What a run frees is left to the allocator where it may have so much more than it takes ...
SPACIOUS = 1.5
#: ... and no matrix has more numbers than this: with larger ones it gains no time (measured).
SMALL_MATRIX = 1 << 22


@dataclass(frozen=True)
class MemoryPolicy:
    """How a walk trades memory for time and disk. ``cached_forwards``: how many forward passes retain what
    they have computed between the groups of a block (None: all); ``activation_folder``: where hidden states
    lie between blocks (None: in memory); ``keep_freed``: memory that is freed stays with the allocator."""

    cached_forwards: int | None = None
    activation_folder: Path | None = None
    keep_freed: bool = False

    def tidy(self) -> None:
        """Give what is free back to the system, unless it is to be kept."""
        if not self.keep_freed:
            release_memory()


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes beside what the process has before the first block. ``block_cached``: the weights and moments of
    a block, at its widest, where all passes are cached and weights behind them go; ``block_repeated``: where
    some are begun again and need them all; ``forward``: activations that a cached pass over a batch retains;
    ``states``: hidden states of a batch between blocks; ``batches``: how many there are; ``dense_batches``:
    over how many of them the dense model runs as well; ``largest``: numbers of the largest matrix."""

    block_cached: int
    block_repeated: int
    forward: int
    states: int
    batches: int
    dense_batches: int
    largest: int = 0

    def passes(self, policy: MemoryPolicy) -> int:
        """How many forward passes are cached."""
        cached = self.batches
        if policy.cached_forwards is not None:
            cached = min(policy.cached_forwards, self.batches)
        return cached + min(cached, self.dense_batches)

    def of(self, policy: MemoryPolicy) -> int:
        """Bytes that a walk takes by this policy."""
        streams, passes = self.batches + self.dense_batches, self.passes(policy)
        block = self.block_cached if passes == streams else self.block_repeated
        between = 0 if policy.activation_folder else streams * self.states
        return block + passes * self.forward + between


def token_batches(tokens: Tokens) -> tuple[Tensor, ...]:
    """Token ids [n, len] without padding in batches of at most :data:`BATCH_TOKENS` tokens, or of a sequence;
    as :meth:`srcr.data.tokens.Tokens.batches` sorts them."""
    return tuple(batch.input_ids for batch in tokens.batches(BATCH_TOKENS))


def estimate_memory(
    topology: Topology, batches: Sequence[Tensor], dense_batches: int, dtype: torch.dtype
) -> MemoryEstimate:
    """What a walk over token ids [n, len] of each batch takes, on ``dense_batches`` of which the dense model
    runs beside the compressed one, both in this precision."""
    tokens = max(ids.numel() for ids in batches)
    partly = 0 < dense_batches < len(batches)
    cached = repeated = forward = largest = 0
    for block in topology.blocks:
        shapes = _group_shapes(topology, block)
        forward = max(forward, _retained_bytes(shapes, tokens, dtype.itemsize))
        for once, again in _block_bytes(shapes, tokens, dtype.itemsize, partly):
            cached, repeated = max(cached, once), max(repeated, again)
        for group in shapes:
            largest = max(largest, group[0][1] ** 2, *(rows * cols for rows, cols in group))
    width = topology.shapes[topology.blocks[0].linears()[0]][1]
    states = tokens * dtype.itemsize * width
    return MemoryEstimate(cached, repeated, forward, states, len(batches), dense_batches, largest)


def choose_policy(
    estimate: MemoryEstimate, budget: int | None, device: torch.device, folder: Path
) -> tuple[MemoryPolicy, str | None]:
    """The policy that a budget in bytes allows (None: :data:`DEFAULT_SHARE` of what is free), with hidden
    states in ``folder`` if need be; and a note where it should be said aloud.

    Raises:
        InputError: the budget cannot be met; it names the smallest that can.
    """
    kernels_for(device)  # compiled code is part of what the process has before the first block
    release_memory()
    base = resident_memory(device)
    free = available_memory(device)
    limit = base + int(DEFAULT_SHARE * free) if budget is None else budget
    tightest = MemoryPolicy(0, folder)
    policies = _policies(estimate, folder)
    policy = next((p for p in policies if base + estimate.of(p) <= limit), None)
    if policy is None and budget is not None:
        # A little more than needed: the next run's program may be a little larger.
        least = min(base + estimate.of(p) for p in (MemoryPolicy(), tightest))
        raise InputError(
            f"--memory {format_megabytes(budget)} is too little for this model and calibration data: with "
            f"{format_megabytes(base)} for the program and what it has loaded, a block needs "
            f"{format_megabytes(estimate.of(tightest))}; use at least {format_megabytes(1.02 * least)}, "
            "or fewer or shorter samples"
        )
    if policy is None:
        return tightest, (
            f"this takes about {format_megabytes(base + estimate.of(tightest))} of memory, and "
            f"{format_megabytes(free)} are free: it may fail"
        )
    if policy == MemoryPolicy():
        spacious = base + SPACIOUS * estimate.of(policy) <= limit
        return MemoryPolicy(keep_freed=spacious and estimate.largest <= SMALL_MATRIX), None
    where = "on disk" if policy.activation_folder else "in memory"
    return policy, (
        f"memory {format_megabytes(limit)}: hidden states {where}, forward passes of "
        f"{estimate.batches - (policy.cached_forwards or 0)} of {estimate.batches} batches begun again for "
        "every group"
    )


def _policies(estimate: MemoryEstimate, folder: Path) -> list[MemoryPolicy]:
    """What may be chosen, the fastest first."""
    fewer = range(estimate.batches - 1, -1, -1)
    return [MemoryPolicy(), *(MemoryPolicy(k) for k in fewer), MemoryPolicy(0, folder)]


def _group_shapes(topology: Topology, block: Block) -> list[list[tuple[int, int]]]:
    """(rows, cols) of the linears of each group of a block."""
    return [[topology.shapes[name] for name in group.names] for group in block.groups]


def _retained_bytes(shapes: list[list[tuple[int, int]]], tokens: int, size: int) -> int:
    """What a cached pass retains: residual and normed states; then what the widest group is given, or what
    attention works on."""
    hidden = shapes[0][0][1]
    attention = sum(rows for rows, _ in shapes[0]) + hidden
    return size * tokens * (2 * hidden + max(*(group[0][1] for group in shapes), attention))


def _block_bytes(
    shapes: list[list[tuple[int, int]]], tokens: int, size: int, partly: bool
) -> list[tuple[int, int]]:
    """What a block takes while each of its groups is solved: where weights behind the passes go, and where
    they do not. ``partly``: the dense model runs on part of the batches."""
    hidden = shapes[0][0][1]
    batch = size * tokens * 2 * (hidden + max(sum(rows for rows, _ in group) for group in shapes))
    sizes = [sum(rows * cols for rows, cols in group) for group in shapes]
    result = []
    for number, group in enumerate(shapes):
        done = 2 * sum(sizes[:number])  # codes and masks
        moments = FLOAT * group[0][1] ** 2
        work = max(_solver_bytes(group), batch + moments + FLOAT * sizes[number]) + SLACK
        if partly:  # moments of the tokens that the dense model saw
            work += moments
        if size < FLOAT:  # those that are solved, in float32
            work += FLOAT * sizes[number]
        once = size * sum(sizes[number:]) + done + work
        again = size * (sum(sizes) + sum(sizes[:number])) + done + work
        result.append((once, again))
    return result


def _solver_bytes(group: Sequence[tuple[int, int]]) -> int:
    """What solving a group of linears [rows, cols] takes besides its weights: the Hessian, its factor and
    ``W X_d^T X``, with a quarter of a matrix more while it is factorised; or, of the linears that are solved
    together, scores, their copy and a mask."""
    cols = group[0][1]
    sizes = [rows * cols for rows, cols in group]
    together = max(sum(n for n in sizes if n <= STACKED_ELEMENTS), *sizes)
    return FLOAT * (2 * cols**2 + sum(sizes)) + max(FLOAT * cols**2 // 4, 9 * together)
