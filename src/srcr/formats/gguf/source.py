"""A GGUF file that srcr wrote, read a tensor at a time under the names of transformers."""

from collections.abc import Sequence
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
from srcr.models.source import plain_config
from srcr.models.streaming import empty_model
from srcr.models.validation import library_errors

#: How far a norm's weight may be from what it was, where 1 was added to it in float32 and taken away again.
OFFSET_ERROR = 2.0**-23
#: How plain tensors are stored.
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GgufFile:
    """The tensors of a GGUF file by llama.cpp's names.

    Raises:
        InputError: it is damaged.
    """

    def __init__(self, path: Path) -> None:
        import gguf

        with library_errors(f"{path} is no GGUF file that can be read"):
            self._tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        self.path = path

    def names(self) -> Sequence[str]:
        """Every tensor's name."""
        return list(self._tensors)

    def kind(self, name: str) -> str:
        """What ggml calls the type of a tensor."""
        return str(self._tensors[name].tensor_type.name)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, its last dimension that which lies together."""
        return tuple(int(n) for n in reversed(self._tensors[name].shape.tolist()))

    def size(self, name: str) -> int:
        """A tensor's bytes."""
        return int(self._tensors[name].n_bytes)

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes uint8 [rows, bytes] of a tensor."""
        data = np.ascontiguousarray(self._tensors[name].data)
        return data.view(np.uint8).reshape(self.shape(name)[0], -1)

    def plain(self, name: str) -> Tensor:
        """A tensor that is not quantized."""
        kind = self.kind(name)
        if kind not in PLAIN:
            raise InputError(f"{name} of {self.path} is {kind}, which srcr does not write")
        data = torch.from_numpy(np.array(self.data(name)))
        return data.view(-1).view(PLAIN[kind]).view(self.shape(name))


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
    def present(self) -> dict[str, str]:
        """Of the model's tensors those that the file has, and their names there."""
        known = set(self.file.names())
        names = {name: self.stored.name(name) for name in empty_model(self).state_dict()}
        return {name: stored for name, stored in names.items() if stored in known}

    def names(self) -> Sequence[str]:
        """Every tensor of the model that the file has."""
        return list(self.present)

    def meta(self, name: str) -> Tensor:
        """A tensor's shape and precision."""
        stored = self.present[name]
        if self.file.kind(stored) in PLAIN and len(self.file.shape(stored)) > 1:
            dtype = PLAIN[self.file.kind(stored)]
            return torch.empty(self.file.shape(stored), dtype=dtype, device="meta")
        if self.file.kind(stored) in PLAIN:
            return torch.empty_like(self.get(name), device="meta")
        return torch.empty(self.file.shape(stored), dtype=self.config.dtype, device="meta")

    def get(self, name: str) -> Tensor:
        """A plain tensor; norms and biases, stored in float32, in the model's precision where that holds
        them."""
        tensor = self.file.plain(self.present[name])
        order, offset = self.stored.row_order(name), self.stored.offset(name)
        if order is not None:
            tensor = tensor[torch.argsort(order)]
        if tensor.ndim > 1 or tensor.dtype == self.config.dtype:
            return tensor - offset if offset else tensor
        tensor = tensor - offset
        rounded = tensor.to(self.config.dtype)
        exact = (rounded.to(torch.float32) - tensor).abs().max() <= (OFFSET_ERROR if offset else 0.0)
        return rounded if bool(exact) else tensor
