"""What a level costs by each of the three counts, and how much a target allows."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from srcr.environment import parse_size
from srcr.errors import InputError
from srcr.formats import Format, get_format
from srcr.formats.checkpoint import Scheme
from srcr.models.blockwise import BlockwiseModel
from srcr.models.topology import LinearGroup, Topology
from srcr.planning.allocate import Option
from srcr.planning.space import SearchSpace
from srcr.plans.plan import Target
from srcr.plans.specs import CompressionLevel
from srcr.storage.safetensors import DTYPE_NAMES, METADATA

Unit = Literal["bits", "stored bytes", "loaded bytes"]

#: The level of what stays as it is.
UNTOUCHED = CompressionLevel(0.0, 16)
#: A budget may be missed from below by this share: it is met in whole layers and whole zeros.
TOLERANCE = 0.005
#: Bytes of a safetensors file before its tensors' entries: length, metadata, padding.
HEADER_BYTES = 8 + len(json.dumps({"__metadata__": METADATA}, separators=(",", ":"))) + 8


@dataclass(frozen=True, eq=False)
class SizeBudget:
    """``limit`` of what the linears' levels may cost together, in a ``unit``: theoretical bits, or bytes
    stored or loaded (everything else that is counted, ``fixed``, is already taken off). ``format``
    (None: bits do not depend on it) and ``dtype`` are those of the checkpoint, ``space`` says how levels
    are made."""

    unit: Unit
    limit: int
    fixed: int
    topology: Topology
    space: SearchSpace
    format: Format | None
    dtype: torch.dtype

    @classmethod
    def of(
        cls, target: Target, model: BlockwiseModel, space: SearchSpace, format_name: str
    ) -> "SizeBudget":
        """What ``target`` leaves for the linears of the blocks, in a checkpoint of this format.

        Raises:
            InputError: a size of a dense checkpoint, an unknown format.
        """
        topology, dtype, fmt = model.topology, model.dtype, get_format(format_name)
        if target.tcr is not None:
            total = 16 * sum(rows * cols for rows, cols in topology.shapes.values())
            limit = int(total * (1 - target.tcr) + 1e-6)
            budget = cls("bits", limit, 0, topology, space, None, dtype)
            return budget.less(budget.untouched)
        if format_name == "dense":
            raise InputError(
                "a dense checkpoint has the same bytes whatever its levels: give the target as tcr=, or use "
                "--format compressed-tensors"
            )
        coded, tables = set(topology.parameters()), space.embedding_plans(topology)
        rest: dict[str, Tensor] = {}
        for layer in tables:
            assert layer.quant is not None
            ref, shape = topology.matrix(layer.name), topology.shape(layer.name)
            rest |= fmt.layout(ref, shape, Scheme.of(layer.quant), dtype)
            coded.add(ref.parameter)
        rest |= {name: model.meta(name) for name in model.names() if name not in coded}
        fixed = sum(tensor.nbytes for tensor in rest.values())
        most = target.stored_bytes
        if most is None:
            assert target.loaded_bytes is not None
            _check_held(fmt, topology, bool(tables))
            budget = cls("loaded bytes", target.loaded_bytes, 0, topology, space, fmt, dtype)
        else:
            fixed += HEADER_BYTES + sum(entry_bytes(name, t, most) for name, t in rest.items())
            budget = cls("stored bytes", most, 0, topology, space, fmt, dtype)
        return budget.less(fixed + budget.untouched)

    def less(self, fixed: int) -> "SizeBudget":
        """The budget without what is spent anyway."""
        return replace(self, limit=self.limit - fixed, fixed=self.fixed + fixed)

    @cached_property
    def groups(self) -> tuple[LinearGroup, ...]:
        """The groups of linears that get a level."""
        return self.space.groups(self.topology)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The linears that get a level."""
        return tuple(name for group in self.groups for name in group.names)

    @property
    def untouched(self) -> int:
        """What the linears cost that stay as they are."""
        others = set(self.topology.shapes) - set(self.names)
        return sum(self.cost(name, UNTOUCHED) for name in others)

    @property
    def counts_zeros(self) -> bool:
        """Whether pruning makes anything smaller by this count: only TCr credits zeros."""
        return self.unit == "bits"

    @property
    def chosen_weights(self) -> int:
        """Weights of the linears that get a level."""
        return sum(math.prod(self.topology.shapes[name]) for name in self.names)

    @property
    def total_weights(self) -> int:
        """Weights of all linears."""
        return sum(rows * cols for rows, cols in self.topology.shapes.values())

    def cost(self, name: str, level: CompressionLevel) -> int:
        """What one linear costs at a level.

        Raises:
            InputError: the group size does not divide its width.
        """
        rows, cols = self.topology.shapes[name]
        if self.format is None:
            return level.cost(rows * cols)
        tensors = self._tensors(name, level)
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self.unit == "stored bytes":
            most = self.limit + self.fixed
            size += sum(entry_bytes(part, tensor, most) for part, tensor in tensors.items())
        return size

    def cost_everywhere(self, level: CompressionLevel) -> int:
        """What all linears that get a level cost at one."""
        return sum(self.cost(name, level) for name in self.names)

    def _tensors(self, name: str, level: CompressionLevel) -> Mapping[str, Tensor]:
        """The tensors without data, by full name, that a linear is stored as at a level."""
        assert self.format is not None
        quant = self.space.layer(name, level, self.topology.shapes).quant
        scheme = None
        if quant is not None:
            scheme = Scheme.of(quant)
        ref, shape = self.topology.matrices[name], self.topology.shapes[name]
        return self.format.layout(ref, shape, scheme, self.dtype)


def _check_held(fmt: Format, topology: Topology, embeddings: bool) -> None:
    """Refuse bytes in memory of what no engine holds packed; ``embeddings``: whether these are rounded.

    Raises:
        InputError: says what.
    """
    if fmt.name == "archive":
        reason = "an archive is unpacked before it runs"
    elif fmt.name == "compressed-tensors" and topology.experts:
        reason = "no engine that srcr was run with holds packed experts of compressed-tensors"
    elif fmt.name == "compressed-tensors" and topology.tied and embeddings:
        reason = "no engine holds a packed embedding that is the output head too"
    else:
        return
    raise InputError(f"{reason}: give the target as stored=, or use --format gguf")


def entry_bytes(name: str, tensor: Tensor, file_bytes: int) -> int:
    """Bytes of a tensor's entry in the header of a safetensors file of at most so many bytes, at most."""
    entry = {
        "dtype": DTYPE_NAMES[tensor.dtype],
        "shape": list(tensor.shape),
        "data_offsets": [file_bytes] * 2,
    }
    return len(json.dumps({name: entry}, separators=(",", ":"), ensure_ascii=False).encode()) - 1


def group_costs(
    groups: Sequence[LinearGroup], levels: Sequence[CompressionLevel], budget: SizeBudget
) -> list[list[Option]]:
    """What every group costs at every level; losses are not known."""
    return [
        [Option(sum(budget.cost(name, level) for name in group.names), 0.0) for level in levels]
        for group in groups
    ]


def check_reachable(budget: SizeBudget) -> None:
    """Refuse a budget that no plan can meet, with the range that can be.

    Raises:
        InputError: smaller than the smallest plan, or larger than the largest.
    """
    options = group_costs(budget.groups, budget.space.levels, budget)
    base = 16 * budget.total_weights
    least = sum(min(option.cost for option in group) for group in options)
    most = sum(max(option.cost for option in group) for group in options)
    if least <= budget.limit and budget.limit * (1 - TOLERANCE) <= most:
        return

    def readable(cost: int) -> str:
        if budget.unit == "bits":
            return f"tcr={1 - (cost + budget.fixed) / base:.4f}"
        return f"{(cost + budget.fixed) / 1e6:.3f} MB"

    raise InputError(
        f"the target {readable(budget.limit)} cannot be met: with these levels {readable(least)} is the "
        f"smallest plan and {readable(most)} the largest"
    )


def fill_budget(
    levels: Mapping[str, CompressionLevel], budget: SizeBudget
) -> dict[str, CompressionLevel]:
    """The levels with fewer zeros, as far as the budget goes: by TCr, where zeros count, and from the linear
    with the most."""
    filled = dict(levels)
    if not budget.counts_zeros:
        return filled
    left = budget.limit - sum(budget.cost(name, level) for name, level in filled.items())
    for name in sorted(filled, key=lambda name: (-filled[name].sparsity, name)):
        level, (rows, cols) = filled[name], budget.topology.shapes[name]
        if level.sparsity == 0 or left < level.num_bits:
            continue
        pruned = round(level.sparsity * rows * cols)
        pruned -= min(pruned, left // level.num_bits)
        finer = CompressionLevel(pruned / (rows * cols), level.num_bits)
        left -= budget.cost(name, finer) - budget.cost(name, level)
        filled[name] = finer
    return filled


def parse_target(text: str) -> Target:
    """The target that ``tcr=0.8125``, ``stored=40MB`` or ``loaded=1.5GiB`` names.

    Raises:
        InputError: another form.
    """
    kind, _, value = text.partition("=")
    if kind == "tcr":
        try:
            return Target(tcr=float(value))
        except ValueError:
            pass
    elif kind == "stored":
        return Target(stored_bytes=parse_size(value))
    elif kind == "loaded":
        return Target(loaded_bytes=parse_size(value))
    raise InputError(f"target {text!r}: use tcr=0.8125, stored=40MB or loaded=4GB")
