"""A source of weights: it hands out one decoder block at a time, in float32, on one device.

The engine sees nothing else of a model, so a source that reads blocks from disk can take the place
of this one, which holds the whole model in memory.
"""

import copy
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from srcr.errors import InputError
from srcr.models.topology import Topology, observe

#: How far blocks run in float32 may be from the model run in its own, 16-bit, precision.
CHAIN_TOLERANCE = 0.1
#: Everything a block is called with besides its hidden states: (positional, keyword) arguments.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class WeightSource(Protocol):
    """What the engine needs of a model."""

    topology: Topology
    dtype: torch.dtype
    device: torch.device

    def embed(self, input_ids: Tensor) -> tuple[Tensor, list[Arguments]]:
        """The first block's hidden states [n, len, width] in float32 for ``input_ids`` [n, len], and
        the other arguments of every block for a batch of that shape."""
        ...

    def block(self, index: int) -> nn.Module:
        """A float32 copy of a block, the caller's to change."""
        ...


class LoadedWeights:
    """A :class:`WeightSource` over a transformers model in memory."""

    def __init__(self, model: Any, device: torch.device | str = "cpu") -> None:
        self.model = model
        self.topology = observe(model)
        self.dtype = next(iter(model.parameters())).dtype
        self.device = torch.device(device)
        self._arguments: dict[tuple[int, ...], list[Arguments]] = {}
        _check_finite(model)
        self._check_chain()

    def block(self, index: int) -> nn.Module:
        block: nn.Module = self.model.get_submodule(self.topology.blocks[index].name)
        return copy.deepcopy(block).to(device=self.device, dtype=torch.float32)

    @torch.no_grad()
    def embed(self, input_ids: Tensor) -> tuple[Tensor, list[Arguments]]:
        """Runs the model with its blocks replaced by stubs that pass hidden states through."""
        blocks = [self.model.get_submodule(block.name) for block in self.topology.blocks]
        seen: list[tuple[Tensor, Arguments]] = []

        def stub(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append((hidden, (args, kwargs)))
            return (hidden,) if self.topology.tuples else hidden

        for block in blocks:
            block.forward = stub
        try:  # the decoder alone: the output head over every token is not needed
            self.model.base_model(input_ids.to(self.model.device), use_cache=False)
        finally:
            for block in blocks:
                del block.forward  # the class's own method shows again
        hidden = seen[0][0].to(device=self.device, dtype=torch.float32)
        arguments = [
            (_move(args, self.device), _move(kwargs, self.device)) for _, (args, kwargs) in seen
        ]
        # Mostly masks and positions, the same for every batch of a shape: keep them once.
        known = self._arguments.setdefault(tuple(input_ids.shape), arguments)
        return hidden, known if _same(known, arguments) else arguments

    @torch.no_grad()
    def _check_chain(self) -> None:
        """Refuse a model that is more than its blocks one after the other."""
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        tokens = (torch.arange(16).view(2, 8) * 13 + 5) % vocabulary
        seen: list[Tensor] = []

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        last = self.model.get_submodule(self.topology.blocks[-1].name)
        handle = last.register_forward_hook(hook)
        try:
            self.model.base_model(tokens.to(self.model.device), use_cache=False)
        finally:
            handle.remove()
        hidden, arguments = self.embed(tokens)
        for index, (args, kwargs) in enumerate(arguments):
            output = self.block(index)(hidden, *args, **kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
        expected = seen[0].to(hidden.device, torch.float32).view_as(hidden)
        error = float((hidden - expected).norm() / expected.norm().clamp_min(1e-30))
        # Where the model itself overflows, the engine will name the layer.
        if bool(torch.isfinite(expected).all()) and not error < CHAIN_TOLERANCE:
            raise InputError(
                f"{type(self.model).__name__} is more than its decoder blocks one after the other: run "
                f"that way it gives other hidden states (relative error {error:.2g}), so srcr cannot "
                "compress it"
            )


def _move(value: Any, device: torch.device) -> Any:
    """``value`` with every tensor on ``device``, floating ones as float32."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float32 if value.is_floating_point() else None)
    if isinstance(value, tuple | list):
        return type(value)(_move(part, device) for part in value)
    if isinstance(value, dict):
        return {key: _move(part, device) for key, part in value.items()}
    return value


def _same(one: Any, other: Any) -> bool:
    """Whether two nests of arguments are equal, tensors by value."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return one is other or bool(one == other)


def _check_finite(model: Any) -> None:
    for name, parameter in model.named_parameters():
        bad = int((~torch.isfinite(parameter)).sum())
        if bad:
            raise InputError(
                f"{name} holds {bad} non-finite value{'s' if bad > 1 else ''} (NaN or infinite): "
                "the checkpoint is damaged, load it again from its source"
            )
