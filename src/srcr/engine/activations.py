"""Hidden states between blocks: in memory, or in a file."""

import tempfile
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from srcr.numerics.tensors import as_bytes


class HiddenStates(Protocol):
    """The hidden states of each batch before a block, [n, len, width] each, one batch after the other."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor: ...

    def __setitem__(self, index: int, value: Tensor, /) -> None: ...

    def append(self, value: Tensor, /) -> None:
        """Those of one more batch."""
        ...


class ActivationFile:
    """:class:`HiddenStates` in a file, of which a batch at a time is in memory. The file has no name: nothing
    is left of it however the process ends. A context manager.

    Raises:
        OSError: the disk refuses.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed with this
        self._device = device
        self._places: list[tuple[int, torch.Size, torch.dtype]] = []

    def __enter__(self) -> "ActivationFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int, /) -> Tensor:
        start, shape, dtype = self._places[index]
        states = torch.empty(shape, dtype=dtype)
        self._file.seek(start)
        self._file.readinto(_bytes(states))
        return states.to(self._device)

    def __setitem__(self, index: int, value: Tensor, /) -> None:
        start, shape, dtype = self._places[index]
        assert (value.shape, value.dtype) == (shape, dtype)
        self._file.seek(start)
        self._file.write(_bytes(value.cpu().contiguous()))

    def append(self, value: Tensor, /) -> None:
        """Those of one more batch, at the end of the file."""
        end = 0
        if self._places:
            start, shape, dtype = self._places[-1]
            end = start + dtype.itemsize * shape.numel()
        self._places.append((end, value.shape, value.dtype))
        self[-1] = value


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    view: memoryview = as_bytes(tensor).numpy().data
    return view
