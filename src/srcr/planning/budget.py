"""What a level costs by each of the three counts, and how much a target allows."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from srcr.errors import InputError
from srcr.formats import Format, dense
from srcr.models.weights import ModelWeights
from srcr.numerics.grid import Grid
from srcr.planning.levels import Level, Treatment
from srcr.types import CompressedWeight, Target

#: Names of types in a safetensors header; no other is longer than that of bfloat16.
DTYPES = {torch.float32: "F32", torch.int32: "I32", torch.int64: "I64", torch.float16: "F16"}
#: Bytes of a safetensors file before its tensors' entries: length, metadata, padding.
HEADER = 8 + len('{"__metadata__":{"format":"pt"}}') + 8


@dataclass(frozen=True, eq=False)
class Budget:
    """``limit`` of what all linears' levels may cost together, in ``unit``: theoretical "bits", "stored
    bytes" or "loaded bytes" (everything else that is stored or loaded, ``fixed``, is already taken off)."""

    unit: str
    limit: int
    fixed: int
    shapes: Mapping[str, tuple[int, int]]
    treatment: Treatment
    fmt: Format | None
    dtype: torch.dtype
    transposed: frozenset[str]
    _known: dict[tuple[tuple[int, int], int], Mapping[str, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, target: Target, source: ModelWeights, treatment: Treatment, fmt: Format
    ) -> "Budget":
        """What ``target`` leaves for the linears of the blocks, in a checkpoint of this format.

        Raises:
            InputError: a rate outside [0, 1).
        """
        topology = source.topology
        shapes, dtype, transposed = topology.shapes, source.dtype, topology.conv1d
        if target.tcr is not None:
            if not 0 <= target.tcr < 1:
                raise InputError(
                    f"target tcr={target.tcr:g}: a rate is from 0 up to but not including 1"
                )
            total = 16 * sum(rows * cols for rows, cols in shapes.values())
            limit = int(total * (1 - target.tcr) + 1e-6)
            return cls("bits", limit, 0, shapes, treatment, None, dtype, transposed)
        if fmt.quantization_config is dense.quantization_config:
            raise InputError(
                "a dense checkpoint has the same bytes whatever its levels: give the target as tcr=, or use "
                "--format compressed-tensors"
            )
        weights = {f"{name}.weight" for name in shapes}
        rest = {name: source.tensor(name) for name in source.names() if name not in weights}
        fixed = sum(tensor.nbytes for tensor in rest.values())
        if target.loaded_bytes is not None:
            return cls("loaded bytes", target.loaded_bytes - fixed, fixed, shapes, treatment, fmt,
                       dtype, transposed)  # fmt: skip
        assert target.stored_bytes is not None
        fixed += HEADER + sum(
            _entry(name, tensor, target.stored_bytes) for name, tensor in rest.items()
        )
        return cls("stored bytes", target.stored_bytes - fixed, fixed, shapes, treatment, fmt, dtype,
                   transposed)  # fmt: skip

    @property
    def counts_zeros(self) -> bool:
        """Whether pruning makes anything smaller by this count: only TCr credits zeros."""
        return self.fmt is None

    def cost(self, name: str, level: Level) -> int:
        """What one linear costs at a level.

        Raises:
            InputError: the group size does not divide its width.
        """
        rows, cols = self.shapes[name]
        if self.fmt is None:
            return level.cost(rows * cols)
        tensors = self._tensors((rows, cols), level.num_bits)
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self.unit == "stored bytes":
            most = self.limit + self.fixed
            size += sum(_entry(name + part, tensor, most) for part, tensor in tensors.items())
        return size

    def _tensors(self, shape: tuple[int, int], bits: int) -> Mapping[str, Tensor]:
        """The tensors of a linear of this shape, by the part of their names after the linear's."""
        if (shape, bits) not in self._known:
            assert self.fmt is not None
            found = self.fmt.tensors("", self._empty(shape, bits), self.dtype, False)
            self._known[shape, bits] = {name: tensor.to("meta") for name, tensor in found.items()}
        return self._known[shape, bits]

    def _empty(self, shape: tuple[int, int], bits: int) -> CompressedWeight:
        rows, cols = shape
        if bits == 16:
            return CompressedWeight(None, 0.0, values=torch.zeros(rows, cols, dtype=self.dtype))
        size = self.treatment.quant.group_size
        size = cols if size in (-1, "auto") else int(size)
        if cols % size:
            raise InputError(f"group size {size} does not divide the width {cols}")
        zero = None if self.treatment.quant.symmetric else torch.zeros(rows, cols // size)
        grid = Grid(torch.ones(rows, cols // size), zero, bits, size, self.dtype)
        return CompressedWeight(None, 0.0, torch.zeros(rows, cols, dtype=torch.int8), grid)


def _entry(name: str, tensor: Tensor, file_bytes: int) -> int:
    """Bytes of a tensor's entry in the header of a safetensors file of at most so many bytes, at most."""
    kind = DTYPES.get(tensor.dtype, "BF16")
    entry = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [file_bytes] * 2}
    return len(json.dumps({name: entry}, separators=(",", ":"), ensure_ascii=False).encode()) - 1


def parse_target(text: str) -> Target:
    """``tcr=0.8125``, ``stored=40MB``, ``loaded=1.5GiB`` as a target.

    Raises:
        InputError: another form.
    """
    kind, _, value = text.partition("=")
    if kind == "tcr":
        try:
            return Target(tcr=float(value))
        except ValueError:
            pass
    elif kind in ("stored", "loaded"):
        from srcr.memory import parse_size

        n = parse_size(value)
        return Target(stored_bytes=n) if kind == "stored" else Target(loaded_bytes=n)
    raise InputError(f"target {text!r}: use tcr=0.8125, stored=40MB or loaded=4GB")
