"""Models whose stacks of experts are taken apart into linears, and put together again."""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from srcr.errors import InputError
from srcr.models.experts import Experts, count_experts, layout_of, without_parameters
from srcr.models.matrices import MatrixRef

#: How far an expert taken apart may be from the stack, on random numbers.
TOLERANCE = 1e-4


def stacks_experts(module: nn.Module) -> bool:
    """Whether a module stacks experts as transformers does."""
    stacks = {name for name, p in module._parameters.items() if p is not None and p.ndim == 3}
    return stacks in ({"gate_up_proj", "down_proj"}, {"up_proj", "down_proj"})


def unfuse(model: Any) -> Any:
    """``model`` itself, every module that stacks experts taken apart; the linears share the stacks' memory.

    Raises:
        InputError: an expert taken apart gives another output than the stack: a layout that is not known.
    """
    checked: set[type] = set()
    for name, module in list(model.named_modules()):
        if stacks_experts(module):
            if type(module) not in checked:
                _check(module, name)
                checked.add(type(module))
            _put(model, name, Experts(module))
    return model


def fuse(model: Any) -> Any:
    """``model`` itself, its experts in stacks again, as transformers has them."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Experts):
            _put(model, name, _stacked(module))
    return model


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, key = name.rpartition(".")
    setattr(model.get_submodule(owner), key, module)


def _stacked(experts: Experts) -> nn.Module:
    """The fused module of some experts: with the stacks that they are views of, where they still are, else
    with stacks of its own."""
    bare: Any = experts.bare
    fused = without_parameters(bare)
    state: Mapping[str, Tensor] = experts.state_dict()
    members: dict[str, list[tuple[MatrixRef, Tensor]]] = {}
    for name, place in experts.places().items():
        members.setdefault(place.parameter, []).append((place, state[name]))
    for parameter, parts in members.items():
        stack = _shared(parts, experts.count)
        if stack is None:
            place, part = parts[0]
            stack = part.new_empty(place.stack_shape(part.shape, experts.count))
            for place, part in parts:
                place.view(stack).copy_(part)
        fused.register_parameter(parameter, nn.Parameter(stack, False))
    return fused


def _shared(parts: Sequence[tuple[MatrixRef, Tensor]], count: int) -> Tensor | None:
    """The stack whose memory all parts lie in, in their places; None where they do not."""
    place, first = parts[0]
    shape = place.stack_shape(first.shape, count)
    storage = first.untyped_storage()
    if first.is_meta or storage.nbytes() != math.prod(shape) * first.itemsize:
        return None
    stack: Tensor = first.new_empty(0)
    stack.set_(storage, 0, torch.Size(shape))  # type: ignore[call-overload]
    for place, part in parts:
        view = place.view(stack)
        if view.data_ptr() != part.data_ptr() or view.stride() != part.stride():
            return None
    return stack


@torch.no_grad()
def _check(fused: Any, name: str) -> None:
    """Compare the module with what it is taken apart to, in small and on random numbers.

    Raises:
        InputError: they differ.
    """
    small: Any = without_parameters(fused)
    small._modules = {
        key: nn.Identity() if any(True for _ in child.parameters()) else child
        for key, child in fused._modules.items()
    }
    layout, (width, units) = layout_of(fused), (8, 6)
    count = count_experts(fused)
    generator = torch.Generator().manual_seed(0)
    for key, stack in fused._parameters.items():
        rows = width if key.startswith("down") else units * (1 + layout.gated)
        cols = units if key.startswith("down") else width
        shape = (rows,) if stack.ndim == 2 else (cols, rows) if layout.transposed else (rows, cols)
        numbers = torch.randn(count, *shape, generator=generator)
        small.register_parameter(key, nn.Parameter(numbers, False))
    for key in ("hidden_size", "hidden_dim"):
        if hasattr(small, key):
            setattr(small, key, width)
    k = min(2, count)
    states = torch.randn(5, width, generator=generator)
    index = torch.stack([torch.randperm(count, generator=generator)[:k] for _ in range(5)])
    routing: tuple[Tensor, ...] = (index, torch.rand(5, k, generator=generator))
    if not hasattr(fused, "is_transposed"):
        states, routing = torch.randn(5 * count, width, generator=generator), ()
    try:
        forward = inspect.unwrap(type(fused).forward)
        expected, given = forward(small, states, *routing), Experts(small)(states, *routing)
        known = bool(torch.allclose(expected, given, atol=TOLERANCE, rtol=TOLERANCE))
    except (AttributeError, RuntimeError, TypeError, ValueError, IndexError):
        known = False
    if not known:
        raise InputError(
            f"{name} ({type(fused).__name__}) stacks experts in a way that srcr does not know: only layouts "
            "of transformers' expert interface are supported"
        )
