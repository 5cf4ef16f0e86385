"""What a run needs, estimated from shapes, and how it fits into a memory budget.

Results do not depend on the budget: it decides in how many batches forward passes may wait within a block
(the others are begun again for every unit), and whether hidden states lie on disk between blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from srcr import memory
from srcr.engine import Room
from srcr.errors import InputError
from srcr.methods.joint import STACKED
from srcr.models.topology import Block, Topology
from srcr.numerics.kernels import kernels_for

FLOAT = 4
#: What allocators and libraries keep besides, found by measuring.
SLACK = 100_000_000


@dataclass(frozen=True)
class Needs:
    """Bytes beside what the process has before the first block. ``weights``: a block's, with what becomes of
    them; ``moments``: of the widest unit, its factor, and what solving it takes; ``batch``: activations
    while one batch passes through a block; ``waiting``: those that a batch's passes keep while they wait;
    ``states``: hidden states of a batch between blocks."""

    weights: int
    moments: int
    batch: int
    waiting: int
    states: int
    batches: int

    def of(self, room: Room) -> int:
        """What a run takes that is given this room."""
        waiting = self.batches if room.waiting is None else min(room.waiting, self.batches)
        # A pass that is begun again needs the weights of all units, and the replaced ones are others.
        weights = self.weights if waiting == self.batches else 2 * self.weights
        states = 0 if room.folder else self.batches * self.states
        return weights + max(self.moments, self.batch) + waiting * self.waiting + states


def needs(topology: Topology, batches: Sequence[torch.Tensor], streams: int) -> Needs:
    """An estimate for token ids [n, len] of each batch, in one or two ``streams``."""
    blocks = [_block(block, topology) for block in topology.blocks]
    weights, moments, batch, waiting = (max(values) for values in zip(*blocks, strict=True))
    hidden = topology.shapes[topology.blocks[0].linears()[0]][1]
    tokens = max(ids.numel() for ids in batches)
    return Needs(
        weights, moments, tokens * batch, streams * tokens * waiting,
        streams * tokens * FLOAT * hidden, len(batches),
    )  # fmt: skip


def _block(block: Block, topology: Topology) -> tuple[int, int, int, int]:
    """Of one block: weights, moments, and for each token and stream batch and waiting."""
    shapes = [
        [topology.shapes[f"{block.name}.{name}"] for name in unit.names] for unit in block.units
    ]
    numbers = [[rows * cols for rows, cols in unit] for unit in shapes]
    total = sum(map(sum, numbers))
    moments = []
    for unit, sizes in zip(shapes, numbers, strict=True):
        width = unit[0][1]
        stack = max(sum(n for n in sizes if n <= STACKED), *sizes)
        # The Hessian, its factor, a quarter more on the way there, W X_d^T X; then of the linears that are
        # solved together the weights twice, codes and masks twice, scores and their copy.
        moments.append(int(2.25 * FLOAT * width**2) + FLOAT * sum(sizes) + 4 * FLOAT * stack)
    hidden = shapes[0][0][1]
    rows = [sum(rows for rows, _ in unit) for unit in shapes]
    # Residual and normed states; then what the widest unit is given, or what attention works on.
    waiting = 2 * hidden + max(*(unit[0][1] for unit in shapes), rows[0] + hidden)
    batch = 2 * hidden + 2 * max(rows)
    codes_and_masks = 2 * total
    return (
        FLOAT * total + codes_and_masks,
        max(moments) + SLACK,
        FLOAT * batch,
        FLOAT * waiting,
    )


def choose_room(
    need: Needs, budget: int | None, device: torch.device, folder: Path
) -> tuple[Room, str | None]:
    """The room that a budget leaves (None: :data:`srcr.memory.DEFAULT_SHARE` of what is free), with hidden
    states in ``folder`` if need be; and a note where it should be said aloud.

    Raises:
        InputError: the budget cannot be met; it names the smallest that can.
    """
    kernels_for(device)  # compiled code is part of what the process has before the first block
    memory.release()
    base = memory.resident(device)
    free = memory.available(device)
    limit = base + int(memory.DEFAULT_SHARE * free) if budget is None else budget
    tightest = Room(0, folder)
    room = next((r for r in _rooms(need, folder) if base + need.of(r) <= limit), None)
    if room is None and budget is not None:
        # A little more than needed: the next run's program may be a little larger.
        smallest = memory.readable(1.02 * min(base + need.of(r) for r in (Room(), tightest)))
        raise InputError(
            f"--memory {memory.readable(budget)} is too little for this model and calibration data: with "
            f"{memory.readable(base)} for the program and what it has loaded, a block needs "
            f"{memory.readable(need.of(tightest))}; use at least {smallest}, or fewer or shorter samples"
        )
    if room is None:
        return tightest, (
            f"this takes about {memory.readable(base + need.of(tightest))} of memory, and "
            f"{memory.readable(free)} are free: it may fail"
        )
    if room == Room():
        return room, None
    where = "on disk" if room.folder else "in memory"
    return room, (
        f"memory {memory.readable(limit)}: hidden states {where}, forward passes of "
        f"{need.batches - (room.waiting or 0)} of {need.batches} batches begun again for every unit"
    )


def _rooms(need: Needs, folder: Path) -> list[Room]:
    """What may be given, the fastest first."""
    return [Room(), *(Room(k) for k in range(need.batches - 1, -1, -1)), Room(0, folder)]
