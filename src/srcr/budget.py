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
from srcr.models.topology import Topology
from srcr.numerics.kernels import kernels_for

FLOAT = 4
#: What allocators and libraries keep besides, found by measuring.
SLACK = 100_000_000
#: What a run frees is left to the allocator where it may have so much more than it needs ...
SPACIOUS = 1.5
#: ... and no matrix has more numbers than this: with larger ones it gains no time.
SMALL = 1 << 22


@dataclass(frozen=True)
class Needs:
    """Bytes beside what the process has before the first block. ``once``: the weights and moments of a
    block, at its widest, where all passes wait and weights behind them go; ``again``: where some are begun
    again and need them all; ``waiting``: activations that a pass over a batch keeps while it waits;
    ``states``: hidden states of a batch between blocks; ``batches``: how many there are; ``dense``: over how
    many of them, the first, the dense model runs as well. ``largest``: numbers of the largest matrix."""

    once: int
    again: int
    waiting: int
    states: int
    batches: int
    dense: int
    largest: int = 0

    def passes(self, room: Room) -> int:
        """How many forward passes wait."""
        waiting = self.batches if room.waiting is None else min(room.waiting, self.batches)
        return waiting + min(waiting, self.dense)

    def of(self, room: Room) -> int:
        """What a run takes that is given this room."""
        streams, passes = self.batches + self.dense, self.passes(room)
        block = self.once if passes == streams else self.again
        return block + passes * self.waiting + (0 if room.folder else streams * self.states)


def needs(
    topology: Topology, batches: Sequence[torch.Tensor], dense: int, running: torch.dtype
) -> Needs:
    """An estimate for token ids [n, len] of each batch, on ``dense`` of which the dense model runs beside
    the compressed one, both in this precision."""
    size = running.itemsize
    tokens = max(ids.numel() for ids in batches)
    once = again = waiting = largest = 0
    for block in topology.blocks:
        units = [
            [topology.shapes[f"{block.name}.{name}"] for name in unit.names] for unit in block.units
        ]
        hidden = units[0][0][1]
        # Residual and normed states; then what the widest unit is given, or what attention works on.
        rows = [sum(rows for rows, _ in unit) for unit in units]
        kept = 2 * hidden + max(*(unit[0][1] for unit in units), rows[0] + hidden)
        waiting = max(waiting, size * tokens * kept)
        batch = size * tokens * 2 * (hidden + max(rows))
        sizes = [sum(rows * cols for rows, cols in unit) for unit in units]
        for number, unit in enumerate(units):
            done = 2 * sum(sizes[:number])  # codes and masks
            moments = FLOAT * unit[0][1] ** 2
            largest = max(largest, unit[0][1] ** 2, *(rows * cols for rows, cols in unit))
            work = max(_solving(unit), batch + moments + FLOAT * sizes[number]) + SLACK
            if 0 < dense < len(batches):  # moments of the tokens that the dense model saw
                work += moments
            if size < FLOAT:  # those that are solved, in float32
                work += FLOAT * sizes[number]
            once = max(once, size * sum(sizes[number:]) + done + work)
            again = max(again, size * (sum(sizes) + sum(sizes[:number])) + done + work)
    hidden = topology.shapes[topology.blocks[0].linears()[0]][1]
    return Needs(once, again, waiting, tokens * size * hidden, len(batches), dense, largest)


def _solving(unit: Sequence[tuple[int, int]]) -> int:
    """What solving a unit of linears [rows, cols] takes besides its weights: the Hessian, its factor and
    ``W X_d^T X``, with a quarter of a matrix more while it is factorised; or, of the linears that are solved
    together, scores, their copy and a mask."""
    cols = unit[0][1]
    sizes = [rows * cols for rows, cols in unit]
    together = max(sum(n for n in sizes if n <= STACKED), *sizes)
    return FLOAT * (2 * cols**2 + sum(sizes)) + max(FLOAT * cols**2 // 4, 9 * together)


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
        spacious = base + SPACIOUS * need.of(room) <= limit
        return Room(keeps=spacious and need.largest <= SMALL), None
    where = "on disk" if room.folder else "in memory"
    return room, (
        f"memory {memory.readable(limit)}: hidden states {where}, forward passes of "
        f"{need.batches - (room.waiting or 0)} of {need.batches} batches begun again for every unit"
    )


def _rooms(need: Needs, folder: Path) -> list[Room]:
    """What may be given, the fastest first."""
    return [Room(), *(Room(k) for k in range(need.batches - 1, -1, -1)), Room(0, folder)]
