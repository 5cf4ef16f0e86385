"""A model that hands out a decoder block at a time, on a device, in the precision it runs in.

The engine sees nothing else of a model, so it does not know whether the model lies in memory or whether
every block comes from its files when it is asked for.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from srcr.environment import multiplies_bfloat16
from srcr.errors import InputError
from srcr.models.couplings import find_couplings
from srcr.models.naming import NamedSource
from srcr.models.observe import observe
from srcr.models.source import CheckpointSource, ModuleSource, WeightSource
from srcr.models.stand_ins import stand_ins
from srcr.models.streaming import (
    CastTensors,
    SourceTensors,
    device_of,
    empty_model,
    filled,
    replaced_forward,
    running_dtype,
)
from srcr.models.topology import Topology, hidden_states
from srcr.models.validation import library_errors

#: How far blocks run in their order may be from the model, on the same stand-ins.
CHAIN_TOLERANCE = 1e-3
#: Everything a block is called with besides its hidden states: (positional, keyword) arguments.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class BlockSource(Protocol):
    """What the engine needs of a model."""

    topology: Topology
    dtype: torch.dtype
    device: torch.device

    def embed(self, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, list[Arguments]]]:
        """For each batch of token ids [n, len] the first block's hidden states [n, len, width], and the
        other arguments of every block for a batch of that shape."""
        ...

    def block(self, index: int) -> nn.Module:
        """A copy of a block, the caller's to change."""
        ...


class BlockwiseModel:
    """A :class:`BlockSource` over a weight source: an empty model of its config, filled while it runs; or,
    where the source is a model in memory, that model.

    Raises:
        InputError: transformers cannot build the model, or it is more than its blocks in a row.
    """

    def __init__(self, source: WeightSource, device: torch.device | str = "cpu") -> None:
        self.in_memory = isinstance(source, ModuleSource)
        self.model: Any = source.model if isinstance(source, ModuleSource) else empty_model(source)
        self.dtype: torch.dtype = next(iter(self.model.parameters())).dtype
        self.device = torch.device(device)
        self.running = running_precision(self.dtype, self.device)
        self._arguments: dict[tuple[int, ...], list[Arguments]] = {}
        with stand_ins(self.model):
            self.topology = observe(
                self.model, lambda topology: find_couplings(self.model, topology)
            )
        if isinstance(source, CheckpointSource) and self.topology.stored:
            source = NamedSource(source, self.topology.stored, self.model)
        self.source = source
        self.tensors = SourceTensors(source, self.model)
        with library_errors(f"{type(self.model).__name__} does not run block by block"):
            self._check_chain()

    @property
    def fits(self) -> bool:
        """Whether the source holds every weight as the model has it."""
        return self.in_memory or self.tensors.fits(self.model)

    def on(self, device: torch.device) -> "BlockwiseModel":
        """The same model on another device; nothing is watched again."""
        if device == self.device:
            return self
        other = copy.copy(self)
        other.device = device
        other.running = running_precision(self.dtype, device)
        other._arguments = {}
        return other

    def names(self) -> list[str]:
        """Every tensor of the model's checkpoint, those that are tied to others left out."""
        state = self.model.state_dict(keep_vars=True)
        first = {id(tensor): name for name, tensor in reversed(state.items())}
        return [name for name, tensor in state.items() if first[id(tensor)] == name]

    def tensor(self, name: str) -> Tensor:
        """A tensor of the checkpoint, as stored, not to be changed."""
        if name in self.tensors:
            return self.tensors.get(name)
        module, _, key = name.rpartition(".")
        tensor = getattr(self.model.get_submodule(module), key)
        assert isinstance(tensor, Tensor)
        return tensor.detach()

    def meta(self, name: str) -> Tensor:
        """A tensor's shape and precision, without data."""
        return self.tensors.meta(name) if name in self.tensors else self.tensor(name).to("meta")

    def matrix(self, name: str) -> Tensor:
        """The weight [rows, cols] of a linear, an embedding or a head, as stored, not to be changed."""
        ref = self.topology.matrix(name)
        return ref.view(self.tensor(ref.parameter))

    def block(self, index: int) -> nn.Module:
        """A copy of a block, on the device, in the precision that blocks run in."""
        name = self.topology.blocks[index].name
        original: nn.Module = self.model.get_submodule(name)
        block = copy_sharing_weights(original)
        for key, original in block.state_dict(keep_vars=True).items():
            owner, _, short = key.rpartition(".")
            module, tensor = block.get_submodule(owner), self.tensor(f"{name}.{key}")
            tensor = tensor.to(self.device, self._running(tensor), copy=True)
            if isinstance(original, nn.Parameter):
                module._parameters[short] = nn.Parameter(tensor, False)
            else:
                module._buffers[short] = tensor
        for module in block.modules():  # tables that no checkpoint holds
            for short in module._non_persistent_buffers_set:
                table = module._buffers[short]
                if table is not None:
                    module._buffers[short] = table.to(self.device, self._running(table))
        return block

    def _running(self, tensor: Tensor) -> torch.dtype:
        """The precision that a tensor of a block is in while blocks run."""
        return running_dtype(tensor.dtype, self.dtype, self.running)

    @torch.no_grad()
    def embed(self, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, list[Arguments]]]:
        """Run what comes before the blocks on each batch; the weights of that are read once."""
        with self._filled():
            for input_ids in batches:
                hidden, arguments = self._embed(input_ids)
                place = self.device, self.running
                arguments = [
                    (_move(args, *place), _move(kwargs, *place)) for args, kwargs in arguments
                ]
                # Mostly masks and positions, the same for every batch of a shape: held once.
                known = self._arguments.setdefault(tuple(input_ids.shape), arguments)
                yield hidden.to(*place), known if _equal(known, arguments) else arguments

    @torch.no_grad()
    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """The logits [n, len, vocabulary] of token ids [n, len] for which the last block gives ``hidden``
        [n, len, width]: the model runs with its blocks left out."""
        blocks = [self.model.get_submodule(block.name) for block in self.topology.blocks]
        device = device_of(self.model)
        states = hidden.to(device, self.running)

        def stub(*_: Any, **__: Any) -> Any:
            return self.topology.block_output(states)

        tensors = CastTensors(self.tensors, self.dtype, self.running, device)
        with (
            filled(self.model, tensors, others=self.topology.others),
            replaced_forward(dict.fromkeys(blocks, stub)),
        ):
            logits: Tensor = self.model(ids.to(device), use_cache=False).logits
        return logits

    def _filled(self) -> AbstractContextManager[None]:
        """While this is open, the decoder can be called with its own weights outside the blocks."""
        if self.in_memory:
            return nullcontext()
        name, others = self.topology.head, self.topology.others
        if name is not None and not self.topology.tied:
            others = tuple(other for other in others if other.rpartition(".")[0] != name)
        return filled(self.model, self.tensors, others=others)

    def _embed(self, input_ids: Tensor) -> tuple[Tensor, list[Arguments]]:
        """The first block's hidden states, and every block's other arguments: the model runs with its blocks
        replaced by stubs that pass hidden states through."""
        blocks = [self.model.get_submodule(block.name) for block in self.topology.blocks]
        seen: list[tuple[Tensor, Arguments]] = []

        def stub(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append((hidden, (args, kwargs)))
            return self.topology.block_output(hidden)

        # The decoder alone: the output head over every token is not needed.
        with replaced_forward(dict.fromkeys(blocks, stub)):
            self.model.base_model(input_ids.to(device_of(self.model)), use_cache=False)
        return seen[0][0], [arguments for _, arguments in seen]

    @torch.no_grad()
    def _check_chain(self) -> None:
        """Refuse a model that is more than its blocks in a row. On stand-ins: no weight is read."""
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        tokens = (torch.arange(16).view(2, 8) * 13 + 5) % vocabulary
        seen: list[Tensor] = []

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen.append(hidden_states(output))

        blocks = [self.model.get_submodule(block.name) for block in self.topology.blocks]
        handle = blocks[-1].register_forward_hook(hook)
        try:
            with stand_ins(self.model):
                self.model.base_model(tokens.to(device_of(self.model)), use_cache=False)
        finally:
            handle.remove()
        with stand_ins(self.model):
            hidden, arguments = self._embed(tokens)
            for block, (args, kwargs) in zip(blocks, arguments, strict=True):
                output = block(hidden, *args, **kwargs)
                hidden = hidden_states(output)
        expected = seen[0].to(hidden).view_as(hidden)
        error = float((hidden - expected).norm() / expected.norm().clamp_min(1e-30))
        if bool(torch.isfinite(expected).all()) and not error < CHAIN_TOLERANCE:
            raise InputError(
                f"{type(self.model).__name__} is more than its decoder blocks one after the other: run "
                f"that way it gives other hidden states (relative error {error:.2g}), so srcr cannot "
                "compress it"
            )


def running_precision(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What blocks run in: a bfloat16 model's own precision where the device multiplies it at full speed (its
    weights, compressed or not, are the same there), else float32."""
    if dtype != torch.bfloat16:
        return torch.float32
    if device.type == "cuda":
        return dtype if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return dtype if multiplies_bfloat16() else torch.float32


def copy_sharing_weights(module: nn.Module) -> nn.Module:
    """A copy with modules and buffers of its own, and the very same parameters."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters()})


def copy_on(base: Any, device: str) -> Any:
    """A copy of a model on a device that shares the weights which lie there already. (``to`` would move those
    of the model itself.)"""
    model = copy_sharing_weights(base)
    shared: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type != device:
                if id(parameter) not in shared:  # tied weights stay tied
                    shared[id(parameter)] = nn.Parameter(parameter.to(device), False)
                module._parameters[key] = shared[id(parameter)]
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else buffer.to(device)
    return model


def _move(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """``value`` with every tensor on ``device``, floating ones as ``dtype``."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, tuple | list):
        return type(value)(_move(part, device, dtype) for part in value)
    if isinstance(value, dict):
        return {key: _move(part, device, dtype) for key, part in value.items()}
    return value


def _equal(left: Any, right: Any) -> bool:
    """Whether two nests of arguments are equal, tensors by value."""
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, tuple | list):
        return len(left) == len(right) and all(map(_equal, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    return left is right or bool(left == right)
