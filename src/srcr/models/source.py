"""Where a model's weights come from: its config, and its tensors by their names in the checkpoint."""

import copy
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from srcr.models.companions import with_code_that_is_there
from srcr.models.config import read_config, read_model_config
from srcr.models.validation import check_leftovers
from srcr.numerics.tensors import dtype_name
from srcr.storage.safetensors import TensorFiles


class WeightSource(Protocol):
    """A model's config and tensors; whoever reads weights reads a source."""

    @property
    def config(self) -> Any:
        """The transformers config that the model is built from."""
        ...

    def config_dict(self) -> dict[str, Any]:
        """``config.json`` of the model, without a quantization_config."""
        ...

    def names(self) -> Sequence[str]:
        """Every tensor's name."""
        ...

    def meta(self, name: str) -> Tensor:
        """A tensor's shape and precision, without data."""
        ...

    def get(self, name: str) -> Tensor:
        """A tensor, not to be changed."""
        ...


class CheckpointSource:
    """The files of a checkpoint folder, read a tensor at a time.

    Raises:
        InputError: as :func:`srcr.models.config.read_model_config`; a damaged file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: Any = read_model_config(folder)
        self._files = TensorFiles(folder)
        self._silent = self.config.dtype is None  # then the files say it, as with dtype="auto"
        if self._silent:
            self.config.dtype = self._stored_dtype()

    def config_dict(self) -> dict[str, Any]:
        """``config.json`` as written; where it names no precision, with that of the files."""
        data = plain_config(self.folder)
        name = dtype_name(self.config.dtype)
        return data | {"dtype": name} if self._silent else data

    def _stored_dtype(self) -> torch.dtype:
        """The precision of the first floating-point tensor of the files."""
        metas = (self._files.meta(name) for name in self.names())
        dtypes = (meta.dtype for meta in metas if meta.is_floating_point() and meta.itemsize > 1)
        return next(dtypes, torch.float32)

    def names(self) -> Sequence[str]:
        """Every tensor of the files."""
        return list(self._files.entries)

    def check_used(self, names: Collection[str]) -> tuple[str, ...]:
        """The tensors of the files that are none of a model's, whose ``names`` these are.

        Raises:
            InputError: they say how its weights are stored.
        """
        return check_leftovers(self.folder, [n for n in self.names() if n not in names], names)

    def meta(self, name: str) -> Tensor:
        """A tensor's shape and precision by the header."""
        return self._files.meta(name)

    def get(self, name: str) -> Tensor:
        """A tensor, in memory of its own."""
        return self._files.get(name)

    def part(self, name: str, index: int) -> Tensor:
        """Entry ``index`` of a tensor along its first axis, in memory of its own; no more is read."""
        return self._files.part(name, index)


class ModuleSource:
    """A transformers model in memory; ``folder`` is where its config.json lies, if it came from files."""

    def __init__(self, model: Any, folder: Path | None = None) -> None:
        self.model = model
        self.folder = folder
        self.config: Any = _config_of(model)
        self._tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)

    def config_dict(self) -> dict[str, Any]:
        """``config.json`` as written, or as transformers would write it."""
        if self.folder is not None:
            return plain_config(self.folder)
        data: dict[str, Any] = self.model.config.to_dict()
        data["architectures"] = [type(self.model).__name__]
        data["dtype"] = dtype_name(self.model.dtype)
        return without_quantization(data)

    def names(self) -> Sequence[str]:
        """Every tensor of the model's state, tied ones too."""
        return list(self._tensors)

    def meta(self, name: str) -> Tensor:
        """A tensor's shape and precision."""
        return torch.empty_like(self._tensors[name], device="meta")

    def get(self, name: str) -> Tensor:
        """The model's own tensor."""
        return self._tensors[name].detach()


def _config_of(model: Any) -> Any:
    """The model's own config, or where that does not say in which precision the model is, a copy that does:
    whatever is built from it is in the same."""
    if model.config.dtype == model.dtype:
        return model.config
    config = copy.deepcopy(model.config)
    config.dtype = model.dtype
    return config


def plain_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a folder, without a quantization_config and without code that is not there."""
    return without_quantization(with_code_that_is_there(read_config(folder), folder))


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json without what says how weights are quantized."""
    return {key: value for key, value in config.items() if key != "quantization_config"}
