"""What every format writes and reads: a checkpoint, its weights read as they are needed."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from srcr.errors import InputError
from srcr.models.checkpoint import OpenModel, load_from
from srcr.models.config import config_of
from srcr.models.matrices import MatrixRef
from srcr.models.topology import LinearGroup, Topology
from srcr.models.unfuse import fuse
from srcr.numerics.compressed import CompressedWeight
from srcr.plans.plan import CompressionPlan
from srcr.plans.specs import QuantSpec


@dataclass(frozen=True)
class Scheme:
    """How a linear's codes are stored: ``num_bits`` each, ``group_size`` columns that share a scale (-1: the
    whole row), ``symmetric`` around 0 or with zero-points, scales that are whole numbers of ``scale_bits``
    in units of their super-blocks (None: they are not)."""

    num_bits: int
    group_size: int
    symmetric: bool
    scale_bits: int | None = None

    @classmethod
    def of(cls, quant: QuantSpec) -> "Scheme":
        """The scheme of a spec whose group size is explicit."""
        assert isinstance(quant.group_size, int), "group sizes are resolved before"
        return cls(quant.num_bits, quant.group_size, quant.symmetric, quant.scale_bits)


@dataclass(frozen=True, eq=False)
class Contents:
    """What a checkpoint holds, known before any weight is: the ``topology`` and the transformers ``config``
    of its model, the ``schemes`` of its quantized linears, embeddings and heads by name, and the names of all
    that are ``compressed``, be it pruned only."""

    topology: Topology
    config: Any
    schemes: Mapping[str, Scheme]
    compressed: tuple[str, ...]

    def group_schemes(self, group: LinearGroup) -> set[Scheme | None]:
        """The different schemes of a group; None for what is not quantized."""
        return {self.schemes.get(name) for name in group.names}

    @cached_property
    def blocks(self) -> list[list[str]]:
        """What is compressed of each decoder block."""
        compressed = set(self.compressed)
        groups = (block.groups for block in self.topology.blocks)
        return [
            [name for group in each for name in group.names if name in compressed]
            for each in groups
        ]

    def embeddings(self) -> list[str]:
        """The embeddings and heads that are quantized."""
        return [name for name in self.topology.embeddings if name in self.schemes]

    def stored(self) -> "Contents":
        """The same under the names, and in the stacks, that a checkpoint on the hub has tensors in."""
        return replace(self, topology=self.topology.as_stored())

    def split_groups(self) -> list[LinearGroup]:
        """The groups whose linears have different schemes, which engines that fuse them cannot serve."""
        return [g for g in self.topology.groups() if len(self.group_schemes(g)) > 1]


def check_own_scales(contents: Contents, fmt: str) -> None:
    """Refuse scales in units of super-blocks, for a format in which each is a number of its own.

    Raises:
        InputError: names a linear that has such.
    """
    for name, scheme in contents.schemes.items():
        if scheme.scale_bits is not None:
            raise InputError(
                f"{fmt} stores every scale as a number of its own, and those of {name} are multiples "
                "(super-blocks of gguf): compress the original model, or use --format dense"
            )


def planned_contents(plan: CompressionPlan, opened: OpenModel) -> Contents:
    """What a checkpoint of a plan for a model will hold; the plan's group sizes are explicit."""
    topology = opened.topology
    layers = [*plan.layers, *(plan.embeddings or ())]
    schemes = {layer.name: Scheme.of(layer.quant) for layer in layers if layer.quant is not None}
    names = {layer.name for layer in layers if layer.quant is not None or layer.prune is not None}
    ordered = [*topology.linears(), *topology.embeddings]
    compressed = tuple(name for name in ordered if name in names)
    return Contents(topology, opened.config, schemes, compressed)


class Moving(Protocol):
    """Compressed weights that need not lie in two places while a checkpoint is written: told of every block
    that is in its folder, and asked which were there already."""

    def moved(self, block: int) -> Sequence[str] | None:
        """The tensors of a block, by the names that they have in the folder, where an earlier run put them
        there; else None."""
        ...

    def move(self, block: int, places: Mapping[str, Sequence[str]]) -> None:
        """A block has been written: its tensors' names by those of the files. It is not read again."""
        ...


class Tensors(Protocol):
    """A model's tensors under their names in its checkpoint."""

    def names(self) -> Sequence[str]:
        """Every tensor's name, those that are tied to others left out."""
        ...

    def meta(self, name: str) -> Tensor:
        """A tensor's shape and precision, without data."""
        ...

    def tensor(self, name: str) -> Tensor:
        """A tensor, not to be changed."""
        ...


class StoredTensors:
    """The ``tensors`` of a model under the names, and in the stacks, that a checkpoint has them in by
    ``places``. What stands there for the ``compressed`` parameters counts for nothing, and is not read."""

    def __init__(
        self, tensors: Tensors, places: Mapping[str, MatrixRef], compressed: Collection[str]
    ) -> None:
        self._tensors = tensors
        self._compressed = compressed
        self._members: dict[str, list[tuple[str, MatrixRef]]] = {}
        for name in tensors.names():
            place = places[name]
            self._members.setdefault(place.parameter, []).append((name, place))

    def names(self) -> Sequence[str]:
        """Every tensor's name."""
        return list(self._members)

    def meta(self, name: str) -> Tensor:
        """A tensor's shape and precision, without data."""
        first, place = self._members[name][0]
        part = self._tensors.meta(first)
        if place.index is None:
            return part
        count = 1 + max(at.index or 0 for _, at in self._members[name])
        return part.new_empty(place.stack_shape(part.shape, count))

    def tensor(self, name: str) -> Tensor:
        """A tensor, stacked of the model's where it is several."""
        members = self._members[name]
        if members[0][1].index is None:
            return self._tensors.tensor(members[0][0])
        stack = torch.zeros_like(self.meta(name), device="cpu")
        for member, at in members:
            if member not in self._compressed:
                at.view(stack).copy_(self._tensors.tensor(member))
        return stack


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model of which some linears are compressed. ``config``: its config.json, without a
    quantization_config; ``dtype``: what it is stored in; ``tensors``: its other tensors (what stands there
    for compressed linears counts for nothing); ``read``: the compressed weight of a linear by name;
    ``save_companions``: writes the files beside config and weights into a folder; ``moving``: who is told
    of blocks that are written, where a format writes a block at a time."""

    contents: Contents
    config: Mapping[str, Any]
    dtype: torch.dtype
    tensors: Tensors
    read: Callable[[str], CompressedWeight]
    save_companions: Callable[[Path], None]
    moving: Moving | None = None

    @classmethod
    def of(
        cls,
        opened: OpenModel,
        contents: Contents | None = None,
        read: Callable[[str], CompressedWeight] | None = None,
    ) -> "Checkpoint":
        """An open model, of which ``read`` gives the linears that ``contents`` says are compressed (None:
        nothing is)."""
        return cls(
            contents or Contents(opened.topology, opened.config, {}, ()),
            opened.source.config_dict(),
            opened.dtype,
            opened.blockwise,
            read or _nothing_compressed,
            opened.save_companions,
        )

    def stored(self) -> "Checkpoint":
        """The same under the names, and in the stacks, that a checkpoint on the hub has tensors in."""
        places = self.contents.topology.stored
        if not places:
            return self
        tensors = StoredTensors(self.tensors, places, self.parameters)
        return replace(self, contents=self.contents.stored(), tensors=tensors)

    @property
    def vocabulary(self) -> int:
        """Rows of the input embedding."""
        topology = self.contents.topology
        return topology.embedding_shapes[topology.embedding][0]

    @cached_property
    def parameters(self) -> dict[str, list[str]]:
        """The compressed linears that lie in each parameter, by the parameter's name."""
        result: dict[str, list[str]] = {}
        for name in self.contents.compressed:
            ref = self.contents.topology.matrix(name)
            result.setdefault(ref.parameter, []).append(name)
        return result

    def plain_names(self) -> list[str]:
        """Every tensor that is no compressed linear's."""
        return [name for name in self.tensors.names() if name not in self.parameters]

    def weight(self, name: str) -> Tensor:
        """The weight of a linear, an embedding or a head, float32 [rows, cols], compressed or not."""
        if name in self.contents.compressed:
            return self.read(name).dequantize()
        ref = self.contents.topology.matrix(name)
        return ref.view(self.tensors.tensor(ref.parameter)).to(torch.float32)

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer as a plain checkpoint stores it."""
        linears = self.parameters.get(name)
        if linears is None:
            return self.tensors.tensor(name).contiguous()
        matrix = self.contents.topology.matrix
        if matrix(linears[0]).index is None:
            return matrix(linears[0]).stored(self.weight(linears[0]).to(self.dtype)).contiguous()
        stack = self.tensors.tensor(name).to(self.dtype, copy=True)
        for linear in linears:
            matrix(linear).view(stack).copy_(self.weight(linear))
        return stack

    def meta(self, name: str) -> Tensor:
        """The shape and precision of :meth:`tensor`."""
        meta = self.tensors.meta(name)
        return meta.to(self.dtype) if name in self.parameters else meta

    def dequantized(self, dtype: torch.dtype | None = None) -> Any:
        """The transformers model of these weights, whole, in its own precision or ``dtype``; its experts are
        linears."""
        return load_from(DequantizedSource(self), dtype)


def dequantizing(
    read: Callable[[Path], Checkpoint],
) -> Callable[[Path, torch.dtype | None], Any]:
    """The ``load`` of a format that no other library opens: the model in a folder, read by ``read``,
    dequantized."""
    return lambda folder, dtype: fuse(read(folder).dequantized(dtype))


class DequantizedSource:
    """A :class:`~srcr.models.source.WeightSource` of a checkpoint's weights."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.config: Any = config_of(checkpoint.config)

    def config_dict(self) -> dict[str, Any]:
        """The checkpoint's config.json."""
        return dict(self._checkpoint.config)

    def names(self) -> Sequence[str]:
        """Every tensor of the model."""
        return self._checkpoint.tensors.names()

    def meta(self, name: str) -> Tensor:
        """A tensor's shape and precision."""
        return self._checkpoint.meta(name)

    def get(self, name: str) -> Tensor:
        """A tensor, dequantized."""
        return self._checkpoint.tensor(name)


def _nothing_compressed(name: str) -> CompressedWeight:
    raise KeyError(f"{name} is not compressed")
