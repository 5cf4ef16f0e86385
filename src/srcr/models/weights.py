"""A source of weights: it hands out one decoder block at a time, on one device, in the precision it runs in.

The engine sees nothing else of a model, so it does not know whether the model lies in memory or whether
every block comes from its files when it is asked for.
"""

import copy
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from srcr.errors import InputError
from srcr.models.load import load_model
from srcr.models.streaming import StoredTensors, can_stream, empty_model, filled
from srcr.models.topology import Topology, home_of, observe
from srcr.numerics.hessian import is_finite

#: How far blocks run one after the other may be from the model, in another precision perhaps.
CHAIN_TOLERANCE = 0.1
#: Everything a block is called with besides its hidden states: (positional, keyword) arguments.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class WeightSource(Protocol):
    """What the engine needs of a model."""

    topology: Topology
    dtype: torch.dtype
    device: torch.device

    def embed(self, input_ids: Tensor) -> tuple[Tensor, list[Arguments]]:
        """The first block's hidden states [n, len, width] for ``input_ids`` [n, len], and the other
        arguments of every block for a batch of that shape."""
        ...

    def block(self, index: int) -> nn.Module:
        """A copy of a block, the caller's to change."""
        ...


def running_precision(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What blocks run in: a bfloat16 model's own precision where the device multiplies it at full speed (its
    weights, compressed or not, are the same there), else float32."""
    if dtype != torch.bfloat16:
        return torch.float32
    if device.type == "cuda":
        return dtype if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    fast = any(getattr(torch.cpu, name, lambda: False)() for name in names)
    return dtype if fast else torch.float32


class ModelWeights:
    """A :class:`WeightSource` over a transformers model: one in memory, or, with ``stored`` tensors, an
    empty one.

    Raises:
        InputError: a weight is not finite, or the model is more than its blocks one after the other.
    """

    def __init__(
        self, model: Any, device: torch.device | str = "cpu", stored: StoredTensors | None = None
    ) -> None:
        self.model = model
        self.stored = stored
        self.dtype = next(iter(model.parameters())).dtype
        self.device = torch.device(device)
        self.running = running_precision(self.dtype, self.device)
        self._arguments: dict[tuple[int, ...], list[Arguments]] = {}
        for name in self.names():
            _check_finite(name, self.tensor(name))
        with self._running():
            self.topology = observe(model)
        self._check_chain()

    def names(self) -> list[str]:
        """Every tensor of the model's checkpoint, those that are tied to others left out."""
        state = self.model.state_dict(keep_vars=True)
        first = {id(tensor): name for name, tensor in reversed(state.items())}
        return [name for name, tensor in state.items() if first[id(tensor)] == name]

    def tensor(self, name: str) -> Tensor:
        """One tensor of the checkpoint, as stored."""
        if self.stored is not None and name in self.stored:
            return self.stored.get(name)
        module, _, key = name.rpartition(".")
        tensor = getattr(self.model.get_submodule(module), key)
        assert isinstance(tensor, Tensor)
        return tensor.detach()

    def _running(self) -> AbstractContextManager[None]:
        """While this is open, the model can be called."""
        return nullcontext() if self.stored is None else filled(self.model, self.stored)

    def block(self, index: int) -> nn.Module:
        name = self.topology.blocks[index].name
        original: nn.Module = self.model.get_submodule(name)
        block = copy_sharing_weights(original)
        for key in [key for key, _ in block.named_parameters()]:
            owner, _, short = key.rpartition(".")
            tensor = self.tensor(f"{name}.{key}").to(self.device, self.running, copy=True)
            block.get_submodule(owner)._parameters[short] = nn.Parameter(tensor, False)
        return block.to(device=self.device, dtype=self.running)

    @torch.no_grad()
    def embed(self, input_ids: Tensor) -> tuple[Tensor, list[Arguments]]:
        """Runs the model with its blocks replaced by stubs that pass hidden states through."""
        blocks = [self.model.get_submodule(block.name) for block in self.topology.blocks]
        seen: list[tuple[Tensor, Arguments]] = []

        def stub(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append((hidden, (args, kwargs)))
            passed = hidden if len(seen) < len(blocks) else hidden[:0]  # none for the norm behind
            return (passed,) if self.topology.tuples else passed

        for block in blocks:
            block.forward = stub
        try:  # the decoder alone: the output head over every token is not needed
            with self._running():
                self.model.base_model(input_ids.to(home_of(self.model)), use_cache=False)
        finally:
            for block in blocks:
                del block.forward  # the class's own method shows again
        place = self.device, self.running
        hidden = seen[0][0].to(*place)
        arguments = [(_move(args, *place), _move(kwargs, *place)) for _, (args, kwargs) in seen]
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
            with self._running():
                self.model.base_model(tokens.to(home_of(self.model)), use_cache=False)
        finally:
            handle.remove()
        hidden, arguments = self.embed(tokens)
        for index, (args, kwargs) in enumerate(arguments):
            output = self.block(index)(hidden, *args, **kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden.to(torch.float32)
        expected = seen[0].to(hidden).view_as(hidden)
        error = float((hidden - expected).norm() / expected.norm().clamp_min(1e-30))
        # Where the model itself overflows, the engine will name the layer.
        if bool(torch.isfinite(expected).all()) and not error < CHAIN_TOLERANCE:
            raise InputError(
                f"{type(self.model).__name__} is more than its decoder blocks one after the other: run "
                f"that way it gives other hidden states (relative error {error:.2g}), so srcr cannot "
                "compress it"
            )


def _move(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """``value`` with every tensor on ``device``, floating ones as ``dtype``."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, tuple | list):
        return type(value)(_move(part, device, dtype) for part in value)
    if isinstance(value, dict):
        return {key: _move(part, device, dtype) for key, part in value.items()}
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


def copy_sharing_weights(module: nn.Module) -> nn.Module:
    """A copy with modules and buffers of its own, and the very same parameters."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters()})


def _check_finite(name: str, tensor: Tensor) -> None:
    if not is_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        raise InputError(
            f"{name} holds {bad} non-finite value{'s' if bad > 1 else ''} (NaN or infinite): "
            "the checkpoint is damaged, load it again from its source"
        )


def open_weights(folder: Path, device: torch.device | str = "cpu") -> ModelWeights:
    """The weights of a checkpoint: from its files as they are needed, where they lie there as the model
    wants them, else from the model that transformers makes of them.

    Raises:
        InputError: as :func:`srcr.models.load.load_model` and :class:`ModelWeights`.
    """
    if can_stream(folder):
        model = empty_model(folder)
        stored = StoredTensors(folder, model)
        if stored.fits(model):
            return ModelWeights(model, device, stored)
    return ModelWeights(load_model(folder), device)
