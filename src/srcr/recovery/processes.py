"""Processes that train together, on one machine or several, through accelerate."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from srcr.errors import InputError

T = TypeVar("T")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Processes:
    """How many processes train together, and which of them this is. Every one holds all of the model; each
    takes its share of the rows, and sums are those of all."""

    rank: int = 0
    count: int = 1
    device: torch.device = CPU

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def share(self, items: list[T]) -> list[T]:
        """This process's part of the items that all have."""
        return items[self.rank :: self.count]

    def all_reduce_(self, tensors: Iterable[Tensor]) -> None:
        """Add up each tensor over all processes, in place."""
        if self.count > 1:
            for tensor in tensors:
                moved = tensor.to(self.device)  # NCCL sums what lies on a GPU
                torch.distributed.all_reduce(moved)
                if moved is not tensor:
                    tensor.copy_(moved)

    def broadcast(self, value: T) -> T:
        """The value that the main process has."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]  # type: ignore[no-any-return]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """What the main process does here, the others do after it: what it leaves in a cache, they find."""
        if self.count > 1 and not self.is_main:
            torch.distributed.barrier()
        yield
        if self.count > 1 and self.is_main:
            torch.distributed.barrier()

    def leave(self) -> None:
        """Go on alone: libraries that see a process group wait for each other while they load."""
        if self.count > 1:
            from accelerate import PartialState

            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
            PartialState._reset_state()


#: A process by itself.
ALONE = Processes()


def current_processes(device: torch.device) -> Processes:
    """The processes that this one was started among, by torchrun or ``accelerate launch``.

    Raises:
        InputError: it was, but accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return ALONE
    try:
        from accelerate import PartialState
    except ImportError:
        raise InputError(
            "training with several processes needs accelerate: pip install 'srcr[distributed]'"
        ) from None
    state = PartialState(cpu=device.type == "cpu")
    return Processes(state.process_index, state.num_processes, state.device)
