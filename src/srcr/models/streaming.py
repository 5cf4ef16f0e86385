"""A model that never has to fit: built empty, its modules filled while they run."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from srcr.models.source import WeightSource
from srcr.models.validation import library_errors


class Tensors(Protocol):
    """A model's tensors by their names in it."""

    def get(self, name: str) -> Tensor:
        """A tensor, in the precision that the model runs in."""
        ...


def empty_model(source: WeightSource) -> Any:
    """The causal LM of a source with its buffers, and with parameters that have shapes but no data.

    Raises:
        InputError: transformers cannot build it.
    """
    from transformers import AutoModelForCausalLM

    config = source.config
    dtype = getattr(config, "dtype", None) or torch.float32
    with library_errors("transformers cannot build the model"), _empty_parameters():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    return model.eval().requires_grad_(False)


def device_of(model: Any) -> torch.device:
    """The device that a model runs on; the CPU for an empty model, which is filled while it runs."""
    device: torch.device = model.device
    return torch.device("cpu") if device.type == "meta" else device


class SourceTensors:
    """The tensors of an empty ``model`` by their names in it, from a source that may store a tied weight
    under another of its names; in the model's precision."""

    def __init__(self, source: WeightSource, model: nn.Module) -> None:
        self.source = source
        available = set(source.names())
        owners: dict[int, list[str]] = {}
        state = dict(model.named_parameters(remove_duplicate=False))
        for name, parameter in state.items():
            owners.setdefault(id(parameter), []).append(name)
        self._stored = {
            name: next((n for n in owners[id(parameter)] if n in available), name)
            for name, parameter in state.items()
        }
        self._dtypes = {name: parameter.dtype for name, parameter in state.items()}
        self._available = available

    def __contains__(self, name: str) -> bool:
        return self._stored.get(name, name) in self._available

    def get(self, name: str) -> Tensor:
        """A tensor, by its name in the model."""
        tensor = self.source.get(self._stored.get(name, name))
        return tensor.to(self._dtypes.get(name, tensor.dtype))

    def meta(self, name: str) -> Tensor:
        """The shape and precision of what :meth:`get` gives."""
        meta = self.source.meta(self._stored.get(name, name))
        return meta.to(self._dtypes.get(name, meta.dtype))

    def fits(self, model: nn.Module) -> bool:
        """Whether the source holds every weight under the name and in the shape that the model has."""
        return not self.misfits(model)

    def misfits(self, model: nn.Module) -> list[str]:
        """Names of the weights that the source lacks, or has in another shape than the model."""
        return [
            name
            for name, tensor in model.state_dict().items()
            if name not in self
            or self.source.meta(self._stored.get(name, name)).shape != tensor.shape
        ]


@contextmanager
def filled(model: nn.Module, tensors: Tensors, retain: bool = False) -> Iterator[None]:
    """While this is open, ``model`` runs: each module gets its weights when it is called and lets go of
    them when it is done, or with ``retain`` when this closes."""
    handles, restored = [], []
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        fill = partial(_fill, own=own, name=name, tensors=tensors)
        handles.append(module.register_forward_pre_hook(fill, prepend=True))
        if retain:
            restored.append((module, own))
        else:
            empty = partial(_restore, own=own)
            handles.append(module.register_forward_hook(empty, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, own in restored:
            module._parameters.update(own)


def _fill(
    module: nn.Module, _: Any, own: Mapping[str, nn.Parameter], name: str, tensors: Tensors
) -> None:
    for key, original in own.items():
        if module._parameters[key] is original:  # not filled yet
            tensor = tensors.get(f"{name}.{key}" if name else key)
            if not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, False)
            module._parameters[key] = tensor


def _restore(module: nn.Module, _: Any, __: Any, own: Mapping[str, nn.Parameter]) -> None:
    module._parameters.update(own)


@contextmanager
def replaced_forward(modules: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """While this is open, calling a module calls what stands for it here."""
    with ExitStack() as stack:
        for module, forward in modules.items():
            stack.callback(_reset_forward, module, module.__dict__.get("forward"))
            module.forward = forward
        yield


def _reset_forward(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    if forward is None:
        del module.forward  # the class's own method shows again
    else:
        module.forward = forward


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
