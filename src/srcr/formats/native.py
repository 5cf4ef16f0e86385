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
PARTS = (
    "shape", "error", "codes", "scale", "super_scale", "product", "zero_point", "values", "mask",
)  # fmt: skip


def encode(weight: CompressedWeight) -> dict[str, Tensor]:
    """The tensors of a weight. ``shape`` int64: its rows, columns, bits and group size (16 and -1 where it is
    not quantized), and the bits of its scales where they are multiples; ``error`` float64 []; ``codes``
    uint8; ``scale`` [rows, groups], int8 where they are multiples of ``super_scale`` [rows, super-blocks];
    ``product`` [0] in the precision that codes and scales are multiplied in, where it is another than
    theirs; ``zero_point`` int8 [rows, groups] where it is asymmetric; or ``values`` [rows, cols]; ``mask``
    uint8 where it is pruned."""
    rows, cols = weight.shape
    tensors = {"error": torch.tensor(weight.error, dtype=torch.float64)}
    shape = [rows, cols, 16, -1]
    if weight.codes is not None:
        grid = weight.grid
        assert grid is not None
        shape = [rows, cols, grid.num_bits, grid.group_size]
        lowest, _ = code_range(grid.num_bits)
        unsigned = (weight.codes.to(torch.int16) - lowest).to(torch.uint8)
        tensors["codes"] = pack(unsigned, grid.num_bits)
        if grid.super_scale is None or grid.scale_bits is None:
            tensors["scale"] = grid.scale.to(grid.dtype).contiguous()
        else:
            tensors["scale"] = grid.multiples().to(torch.int8)
            tensors["super_scale"] = grid.super_scale.to(grid.dtype).contiguous()
            shape.append(grid.scale_bits)
        if grid.product_dtype != grid.dtype:
            tensors["product"] = torch.empty(0, dtype=grid.product_dtype)
        if grid.zero_point is not None:
            tensors["zero_point"] = grid.zero_point.to(torch.int8).contiguous()
    else:
        assert weight.values is not None
        tensors["values"] = weight.values.contiguous()
    if weight.mask is not None:
        tensors["mask"] = pack(weight.mask.to(torch.uint8), 1)
    tensors["shape"] = torch.tensor(shape, dtype=torch.int64)
    return tensors


def decode(tensors: Mapping[str, Tensor]) -> CompressedWeight:
    """The weight that :func:`encode` made ``tensors`` of."""
    rows, cols, bits, size, *scale_bits = tensors["shape"].tolist()
    mask = codes = grid = None
    if "mask" in tensors:
        mask = unpack(tensors["mask"], 1, (rows, cols)).to(torch.bool)
    if "codes" in tensors:
        lowest, _ = code_range(bits)
        codes = (unpack(tensors["codes"], bits, (rows, cols)).to(torch.int16) + lowest).to(
            torch.int8
        )
        stored = tensors.get("super_scale", tensors["scale"])
        product = tensors["product"].dtype if "product" in tensors else None
        scale, zero_point, super_scale = (
            tensors[part].to(torch.float32) if part in tensors else None
            for part in ("scale", "zero_point", "super_scale")
        )
        assert scale is not None
        grid = Grid(scale, zero_point, bits, size, stored.dtype, product)
        if super_scale is not None:
            grid = grid.in_units(super_scale, scale_bits[0])
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
