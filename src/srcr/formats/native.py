"""A compressed weight as named tensors, and back: bit for bit, mask and grid included.

What keeps compressed weights on disk between steps (the journal of a run, the level database) keeps them in
this form. Codes and masks are packed without gaps; scales are stored in their own precision.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from srcr.numerics.compressed import CompressedWeight
from srcr.numerics.grid import Grid, code_range
from srcr.numerics.packing import pack, unpack

#: Between the name of a linear and that of one of its tensors.
SEPARATOR = ":"
#: The tensors that a weight may have.
PARTS = ("shape", "error", "codes", "scale", "product", "zero_point", "values", "mask")


def encode(weight: CompressedWeight) -> dict[str, Tensor]:
    """The tensors of a weight. ``shape`` int64 [4]: its rows, columns, bits and group size (16 and -1 where
    it is not quantized); ``error`` float64 []; ``codes`` uint8, ``scale`` [rows, groups], ``product`` [0] in
    the precision that both are multiplied in where it is another than the scale's, and where it is asymmetric
    ``zero_point`` int8 [rows, groups], or ``values`` [rows, cols]; ``mask`` uint8 where it is pruned."""
    rows, cols = weight.shape
    tensors = {"error": torch.tensor(weight.error, dtype=torch.float64)}
    bits, size = 16, -1
    if weight.codes is not None:
        grid = weight.grid
        assert grid is not None
        bits, size = grid.num_bits, grid.group_size
        lowest, _ = code_range(bits)
        unsigned = (weight.codes.to(torch.int16) - lowest).to(torch.uint8)
        tensors["codes"] = pack(unsigned, bits)
        tensors["scale"] = grid.scale.to(grid.dtype).contiguous()
        if grid.product_dtype != grid.dtype:
            tensors["product"] = torch.empty(0, dtype=grid.product_dtype)
        if grid.zero_point is not None:
            tensors["zero_point"] = grid.zero_point.to(torch.int8).contiguous()
    else:
        assert weight.values is not None
        tensors["values"] = weight.values.contiguous()
    if weight.mask is not None:
        tensors["mask"] = pack(weight.mask.to(torch.uint8), 1)
    tensors["shape"] = torch.tensor([rows, cols, bits, size], dtype=torch.int64)
    return tensors


def decode(tensors: Mapping[str, Tensor]) -> CompressedWeight:
    """The weight that :func:`encode` made ``tensors`` of."""
    rows, cols, bits, size = tensors["shape"].tolist()
    mask = codes = grid = None
    if "mask" in tensors:
        mask = unpack(tensors["mask"], 1, (rows, cols)).to(torch.bool)
    if "codes" in tensors:
        lowest, _ = code_range(bits)
        codes = (unpack(tensors["codes"], bits, (rows, cols)).to(torch.int16) + lowest).to(
            torch.int8
        )
        scale, zero_point = tensors["scale"], tensors.get("zero_point")
        grid = Grid(
            scale.to(torch.float32),
            None if zero_point is None else zero_point.to(torch.float32),
            bits,
            size,
            scale.dtype,
            tensors["product"].dtype if "product" in tensors else None,
        )
    return CompressedWeight(mask, float(tensors["error"]), codes, grid, tensors.get("values"))


def encode_all(weights: Mapping[str, CompressedWeight]) -> dict[str, Tensor]:
    """The tensors of several weights, each called by its weight's name and its own."""
    return {
        f"{name}{SEPARATOR}{part}": tensor
        for name, weight in weights.items()
        for part, tensor in encode(weight).items()
    }


def decode_from(
    names: Mapping[str, object], get: Callable[[str], Tensor], name: str
) -> CompressedWeight:
    """The weight called ``name`` among those of :func:`encode_all`, of which ``names`` are there and ``get``
    reads a tensor."""
    keys = {part: f"{name}{SEPARATOR}{part}" for part in PARTS}
    return decode({part: get(key) for part, key in keys.items() if key in names})
