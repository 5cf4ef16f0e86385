"""A model that never has to fit: built empty, its modules filled from the files while they run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from srcr.formats.safetensors_files import TensorFiles
from srcr.models.guard import guest
from srcr.models.load import is_quantized, read_model_config


class Tensors(Protocol):
    """A model's tensors by their names in it."""

    def get(self, name: str) -> Tensor:
        """One tensor, in the model's precision."""
        ...


class StoredTensors:
    """The tensors of an empty model, read from its checkpoint one at a time in the model's precision."""

    def __init__(self, folder: Path, model: nn.Module) -> None:
        with TensorFiles(folder) as files:
            self._paths = files.paths_by_name()
            self._shapes = files.shapes()
        # A tied weight is in the file once, under the name of one of those that share it.
        owners: dict[int, list[str]] = {}
        state = dict(model.named_parameters(remove_duplicate=False))
        for name, parameter in state.items():
            owners.setdefault(id(parameter), []).append(name)
        self._stored = {
            name: next((n for n in owners[id(parameter)] if n in self._paths), name)
            for name, parameter in state.items()
        }
        self._dtypes = {name: parameter.dtype for name, parameter in state.items()}

    def __contains__(self, name: str) -> bool:
        return self._stored.get(name, name) in self._paths

    def get(self, name: str) -> Tensor:
        """One tensor, by its name in the model; memory of its own."""
        stored = self._stored.get(name, name)
        with safe_open(self._paths[stored], framework="pt") as file:
            tensor: Tensor = file.get_tensor(stored)
            # A mapped file counts as memory for as long as it is open.
            return tensor.to(self._dtypes.get(name, tensor.dtype), copy=True)

    def fits(self, model: nn.Module) -> bool:
        """Whether the files hold every weight under the name and in the shape that the model has."""
        return all(
            self._shapes.get(self._stored.get(name, name)) == tuple(tensor.shape)
            for name, tensor in model.state_dict().items()
        )


def empty_model(folder: Path) -> Any:
    """The causal LM of ``folder`` with its buffers, and with parameters that have shapes but no data.

    Raises:
        InputError: as :func:`srcr.models.load.read_model_config`.
    """
    from transformers import AutoModelForCausalLM

    config = read_model_config(folder)
    dtype = getattr(config, "dtype", None) or torch.float32
    with guest(f"transformers cannot build the model of {folder}"), _empty_parameters():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    return model.eval().requires_grad_(False)


def can_stream(folder: Path) -> bool:
    """Whether a checkpoint is of the plain kind: what is quantized, transformers has to load."""
    return not is_quantized(folder)


@contextmanager
def _empty_parameters() -> Iterator[None]:
    """Parameters registered meanwhile keep their shape only; buffers are computed as usual."""
    register = nn.Module.register_parameter

    def empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = empty  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextmanager
def filled(model: nn.Module, tensors: Tensors) -> Iterator[None]:
    """While this is open, ``model`` runs: each module gets its weights when it is called and lets go of
    them when it is done."""
    handles = []
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue

        def fill(
            module: nn.Module, _: Any, own: dict[str, nn.Parameter] = own, name: str = name
        ) -> None:
            for key in own:
                tensor = tensors.get(f"{name}.{key}" if name else key)
                module._parameters[key] = nn.Parameter(tensor, requires_grad=False)

        def empty(module: nn.Module, _: Any, __: Any, own: dict[str, nn.Parameter] = own) -> None:
            module._parameters.update(own)

        handles.append(module.register_forward_pre_hook(fill, prepend=True))
        handles.append(module.register_forward_hook(empty, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
