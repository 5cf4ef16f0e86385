"""A source of weights: it hands out one decoder block at a time, in float32, on one device.

The engine sees nothing else of a model, so a source that reads blocks from disk can take the place
of this one, which holds the whole model in memory.
"""

import copy
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from srcr.errors import InputError
from srcr.models.topology import Topology, linear_weight, observe

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
        shape = tuple(input_ids.shape)
        if shape not in self._arguments:
            self._arguments[shape] = [
                (_move(args, self.device), _move(kwargs, self.device)) for _, (args, kwargs) in seen
            ]
        return hidden, self._arguments[shape]


def _move(value: Any, device: torch.device) -> Any:
    """``value`` with every tensor on ``device``, floating ones as float32."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float32 if value.is_floating_point() else None)
    if isinstance(value, tuple | list):
        return type(value)(_move(part, device) for part in value)
    if isinstance(value, dict):
        return {key: _move(part, device) for key, part in value.items()}
    return value


def _check_finite(model: Any) -> None:
    for name, parameter in model.named_parameters():
        bad = int((~torch.isfinite(parameter)).sum())
        if bad:
            raise InputError(
                f"{name} holds {bad} non-finite value{'s' if bad > 1 else ''} (NaN or infinite): "
                "the checkpoint is damaged, load it again from its source"
            )


def weights_of(block: nn.Module, names: tuple[str, ...]) -> list[Tensor]:
    """The weights [out, in] of some linears of a block."""
    return [linear_weight(block.get_submodule(name)) for name in names]
