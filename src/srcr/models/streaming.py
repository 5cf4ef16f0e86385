"""A model that never has to fit: built empty, its blocks filled while they run."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from srcr.models.source import WeightSource
from srcr.models.unfuse import unfuse
from srcr.models.validation import library_errors


class Tensors(Protocol):
    """A model's tensors by their names in it."""

    def get(self, name: str) -> Tensor:
        """A tensor, in the precision that the model runs in."""
        ...


def empty_model(source: WeightSource) -> Any:
    """The causal LM of a source with its buffers, and with parameters that have shapes but no data; experts
    that transformers stacks are linears.

    Raises:
        InputError: transformers cannot build it, or stacks experts in a way that is not known.
    """
    from transformers import AutoModelForCausalLM

    config = source.config
    dtype = getattr(config, "dtype", None) or torch.float32
    with library_errors("transformers cannot build the model"), _empty_parameters():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        _keep_precision(model, dtype)
    return unfuse(model.eval().requires_grad_(False))


def _keep_precision(model: Any, dtype: torch.dtype) -> None:
    """Give the parameters that transformers keeps in another precision than the model's (the bias of a
    router, say) that precision."""
    for pattern, kept in model._get_dtype_plan(dtype).items():
        for slot in _slots(model, ""):
            if re.search(pattern.replace("*", ".*"), slot.name):
                tensor = slot.original.to(kept)
                parameter = isinstance(slot.original, nn.Parameter)
                slot.place[slot.key] = nn.Parameter(tensor, False) if parameter else tensor


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
        state = model.state_dict(keep_vars=True)
        owners: dict[int, list[str]] = {}
        for name, tensor in state.items():
            owners.setdefault(id(tensor), []).append(name)
        self._ties = [names for names in owners.values() if len(names) > 1]
        self._stored = {
            name: next((n for n in owners[id(tensor)] if n in available), name)
            for name, tensor in state.items()
        }
        self._dtypes = {name: tensor.dtype for name, tensor in state.items()}
        self._available = available

    def __contains__(self, name: str) -> bool:
        return self._stored.get(name, name) in self._available

    def get(self, name: str) -> Tensor:
        """A tensor, by its name in the model."""
        tensor = self.source.get(self._stored.get(name, name))
        return tensor.to(self._dtypes.get(name, tensor.dtype))

    def separate(self) -> list[str]:
        """Names that the model ties, but whose tensors differ in the source; empty where all agree."""
        for names in self._ties:
            stored = [name for name in names if name in self._available]
            tensors = (self.source.get(name) for name in stored[1:])
            if len(stored) > 1 and not all(
                torch.equal(self.source.get(stored[0]), tensor) for tensor in tensors
            ):
                return stored
        return []

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


def running_dtype(stored: torch.dtype, dtype: torch.dtype, running: torch.dtype) -> torch.dtype:
    """The precision of a tensor that is ``stored`` so while its model, of ``dtype``, runs in ``running``:
    float32 for all that is floating, else what the model keeps in another than its own stays in that."""
    if not stored.is_floating_point:
        return stored
    return running if stored == dtype or running == torch.float32 else stored


@dataclass(frozen=True)
class CastTensors:
    """``tensors`` of a model of ``dtype`` on a device, in the precision that it runs in."""

    tensors: Tensors
    dtype: torch.dtype
    running: torch.dtype
    device: torch.device

    def get(self, name: str) -> Tensor:
        """A tensor, by its name in the model."""
        tensor = self.tensors.get(name)
        return tensor.to(self.device, running_dtype(tensor.dtype, self.dtype, self.running))


@dataclass(frozen=True, eq=False)
class _Slot:
    """A parameter or persistent buffer of a module: ``name`` in the model, ``original`` what lies there."""

    name: str
    place: dict[str, Tensor | None]
    key: str
    original: Tensor

    def empty(self) -> None:
        """Put the original back."""
        self.place[self.key] = self.original


def _slots(module: nn.Module, prefix: str) -> list[_Slot]:
    """Everything of a module that a checkpoint holds; ``prefix`` is the module's name in the model."""
    slots = []
    for name, child in module.named_modules(prefix=prefix, remove_duplicate=False):
        start = f"{name}." if name else ""
        for place in (child._parameters, child._buffers):
            slots += [
                _Slot(start + key, place, key, tensor)
                for key, tensor in place.items()
                if tensor is not None and key not in child._non_persistent_buffers_set
            ]
    return slots


@contextmanager
def filled(
    model: nn.Module,
    tensors: Tensors,
    blocks: Collection[str] = (),
    others: Collection[str] | None = None,
) -> Iterator[None]:
    """While this is open, ``model`` runs: each of the ``blocks`` holds all its tensors while it runs, and
    ``others`` of the model's tensors (None: all) are held from the beginning to the end."""
    inside = {slot.name for block in blocks for slot in _slots(model.get_submodule(block), block)}
    outer = [
        slot
        for slot in _slots(model, "")
        if slot.name not in inside and (others is None or slot.name in others)
    ]
    with ExitStack() as stack:
        stack.callback(_empty, outer)
        _fill(outer, tensors)
        for block in blocks:
            module = model.get_submodule(block)
            slots = _slots(module, block)
            for handle in (
                module.register_forward_pre_hook(partial(_before, slots, tensors), prepend=True),
                module.register_forward_hook(partial(_after, slots), always_call=True),
            ):
                stack.callback(handle.remove)
        yield


def _before(slots: Sequence[_Slot], tensors: Tensors, *_: Any) -> None:
    _fill(slots, tensors)


def _after(slots: Sequence[_Slot], *_: Any) -> None:
    _empty(slots)


def _fill(slots: Sequence[_Slot], tensors: Tensors) -> None:
    """Put the tensors into their slots; what is tied stays tied."""
    shared: dict[int, Tensor] = {}
    for slot in slots:
        if id(slot.original) not in shared:
            tensor = tensors.get(slot.name)
            if isinstance(slot.original, nn.Parameter) and not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, False)
            shared[id(slot.original)] = tensor
        slot.place[slot.key] = shared[id(slot.original)]


def _empty(slots: Sequence[_Slot]) -> None:
    for slot in slots:
        slot.empty()


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
