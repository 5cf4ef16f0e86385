"""A GGUF file that srcr wrote, read a tensor at a time under the names of transformers."""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from srcr.errors import InputError
from srcr.formats.gguf.architectures import TensorNames
from srcr.models.config import check_causal, config_of
from srcr.models.matrices import MatrixRef
from srcr.models.source import plain_config
from srcr.models.streaming import empty_model

#: How far a norm's weight may be from what it was, where 1 was added to it in float32 and taken away again.
OFFSET_ERROR = 2.0**-23
#: How plain tensors are stored.
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
#: Bytes of a metadata value by its type; 8 and 9 are strings and arrays.
VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY, UINT32 = 8, 9, 4
#: Dimensions of a tensor at most.
DIMENSIONS = 4


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies: the name of its type, its shape (the last dimension lies together), its first byte
    and how many there are."""

    kind: str
    shape: tuple[int, ...]
    start: int
    n_bytes: int


class _Cursor:
    """Reads the header of a GGUF file; nothing is allocated by what it says.

    Raises:
        InputError: the file ends before what it announces.
    """

    def __init__(self, data: npt.NDArray[np.uint8], path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def skip(self, count: int) -> int:
        """The place of the next ``count`` bytes, which are passed over."""
        start = self.at
        if count > len(self.data) - start:
            raise InputError(f"{self.path} is damaged: it ends within its header")
        self.at += count
        return start

    def number(self, form: str) -> int:
        """The next number by its form in :mod:`struct`."""
        start = self.skip(struct.calcsize(form))
        (value,) = struct.unpack("<" + form, self.data[start : self.at].tobytes())
        return int(value)

    def string(self) -> str:
        """The next string."""
        start = self.skip(self.number("Q"))
        return self.data[start : self.at].tobytes().decode("utf-8", "replace")

    def count(self, smallest: int) -> int:
        """How many entries follow, each of at least so many bytes."""
        count = self.number("Q")
        if count * smallest > len(self.data):
            raise InputError(f"{self.path} is damaged: it announces {count} entries")
        return count

    def value(self, kind: int) -> int | None:
        """Passes over a metadata value; a whole number of 32 bits is returned."""
        if kind == UINT32:
            return self.number("I")
        if kind == STRING:
            self.skip(self.number("Q"))
        elif kind == ARRAY:
            of = self.number("I")
            if of == STRING:
                for _ in range(self.count(8)):
                    self.skip(self.number("Q"))
            else:
                self.skip(self._size(of) * self.number("Q"))
        else:
            self.skip(self._size(kind))
        return None

    def _size(self, kind: int) -> int:
        if kind not in VALUE_BYTES:
            raise InputError(f"{self.path} is damaged: metadata of type {kind}")
        return VALUE_BYTES[kind]


class GgufFile:
    """The tensors of a GGUF file by llama.cpp's names.

    Raises:
        InputError: it is damaged, or of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        size = path.stat().st_size
        self._data = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
        self._tensors = self._read_header()

    def _read_header(self) -> dict[str, GgufTensor]:
        cursor = _Cursor(self._data, self.path)
        if self._data[: len(MAGIC)].tobytes() != MAGIC:
            raise InputError(f"{self.path} is no GGUF file")
        cursor.skip(len(MAGIC))
        if (version := cursor.number("I")) != VERSION:
            raise InputError(f"{self.path} is GGUF of version {version}, and srcr reads {VERSION}")
        tensors, values = cursor.count(24), cursor.count(13)
        alignment = ALIGNMENT
        for _ in range(values):
            key = cursor.string()
            value = cursor.value(cursor.number("I"))
            if key == "general.alignment" and value:
                alignment = value
        entries = {cursor.string(): self._entry(cursor) for _ in range(tensors)}
        start = -(-cursor.at // alignment) * alignment
        result = {
            name: replace(entry, start=start + entry.start) for name, entry in entries.items()
        }
        for name, entry in result.items():
            if entry.start + entry.n_bytes > len(self._data):
                raise InputError(f"{self.path} is damaged: it ends before {name} does")
        return result

    def _entry(self, cursor: _Cursor) -> GgufTensor:
        """The next tensor, its start counted from where the header ends."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        dimensions = cursor.number("I")
        if dimensions > DIMENSIONS:
            raise InputError(f"{self.path} is damaged: a tensor of {dimensions} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
        number = cursor.number("I")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise InputError(f"{self.path} is damaged: a tensor of type {number}") from None
        columns, size = GGML_QUANT_SIZES[kind]
        n_bytes = math.prod(shape) // columns * size
        return GgufTensor(kind.name, shape, cursor.number("Q"), n_bytes)

    def names(self) -> Sequence[str]:
        """Every tensor's name."""
        return list(self._tensors)

    def entry(self, place: MatrixRef) -> GgufTensor:
        """A tensor, or an entry of a stack.

        Raises:
            InputError: the stack has no such entry.
        """
        tensor = self._tensors[place.parameter]
        if place.index is None:
            return tensor
        count, *shape = tensor.shape
        if not shape or place.index >= count:
            raise InputError(f"{place.parameter} of {self.path} has no expert {place.index}")
        size = tensor.n_bytes // count
        start = tensor.start + place.index * size
        return replace(tensor, shape=tuple(shape), start=start, n_bytes=size)

    def size(self, name: str) -> int:
        """A tensor's bytes."""
        return self._tensors[name].n_bytes

    def data(self, place: MatrixRef) -> npt.NDArray[np.uint8]:
        """The bytes uint8 [rows, bytes] of a tensor or of an entry of a stack, in memory of their own."""
        tensor = self.entry(place)
        data = np.array(self._data[tensor.start : tensor.start + tensor.n_bytes])
        return data.reshape(tensor.shape[0], -1)

    def plain(self, place: MatrixRef) -> Tensor:
        """A tensor, or an entry of a stack, that is not quantized."""
        tensor = self.entry(place)
        if tensor.kind not in PLAIN:
            raise InputError(
                f"{place.parameter} of {self.path} is {tensor.kind}, which srcr does not write"
            )
        data = torch.from_numpy(self.data(place))
        return data.view(-1).view(PLAIN[tensor.kind]).view(tensor.shape)


class GgufSource:
    """A :class:`~srcr.models.source.WeightSource` of a GGUF ``file`` beside a config.json; of quantized
    tensors it knows the shapes only."""

    def __init__(self, folder: Path, file: GgufFile) -> None:
        check_causal(folder)
        self.file = file
        self._folder = folder
        self.config: Any = config_of(plain_config(folder))
        self.stored = TensorNames(self.config)

    def config_dict(self) -> dict[str, Any]:
        """``config.json`` as written."""
        return plain_config(self._folder)

    @cached_property
    def present(self) -> dict[str, MatrixRef]:
        """Of the model's tensors those that the file has, and their places there."""
        known, names = set(self.file.names()), self.stored
        places = {
            name: MatrixRef(names.name(name), names.expert(name))
            for name in empty_model(self).state_dict()
        }
        return {name: place for name, place in places.items() if place.parameter in known}

    def names(self) -> Sequence[str]:
        """Every tensor of the model that the file has."""
        return list(self.present)

    def meta(self, name: str) -> Tensor:
        """A tensor's shape and precision."""
        tensor = self.file.entry(self.present[name])
        if tensor.kind not in PLAIN:
            return torch.empty(tensor.shape, dtype=self.config.dtype, device="meta")
        if self.stored.is_float32(
            name, len(tensor.shape)
        ):  # its precision is seen from its numbers
            return torch.empty_like(self.get(name), device="meta")
        return torch.empty(tensor.shape, dtype=PLAIN[tensor.kind], device="meta")

    def kind(self, name: str) -> str:
        """What ggml calls the type of a tensor."""
        return self.file.entry(self.present[name]).kind

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes uint8 [rows, bytes] of a tensor."""
        return self.file.data(self.present[name])

    def get(self, name: str) -> Tensor:
        """A plain tensor; norms, biases and routers, stored in float32, in the model's precision where that
        holds them."""
        tensor = self.file.plain(self.present[name])
        order, offset = self.stored.row_order(name), self.stored.offset(name)
        if order is not None:
            tensor = tensor[torch.argsort(order)]
        if offset:
            tensor = tensor - offset
        if not self.stored.is_float32(name, tensor.ndim) or tensor.dtype == self.config.dtype:
            return tensor
        rounded: Tensor = tensor.to(self.config.dtype)
        lost = float((rounded.to(torch.float32) - tensor).abs().max())
        return rounded if lost <= (OFFSET_ERROR if offset else 0.0) else tensor
