"""Codes as llama.cpp stores them: blocks of 32 columns, each with its own scale.

Of ggml's types, Q4_0, Q5_0 and Q8_0 hold w = scale * code with codes around 0, so that a pruned weight is an
exact 0. What srcr chose is stored as it is: nothing is rounded a second time.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from srcr.errors import InputError
from srcr.numerics.compressed import CompressedWeight
from srcr.numerics.grid import Grid

#: Columns of a block.
BLOCK = 32
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class BlockType:
    """A type of ggml: its ``name`` there, the ``num_bits`` of its codes, the ``size`` of a block in bytes."""

    name: str
    num_bits: int
    size: int


#: From narrow to wide.
TYPES = (BlockType("Q4_0", 4, 18), BlockType("Q5_0", 5, 22), BlockType("Q8_0", 8, 34))
BY_NAME: Mapping[str, BlockType] = {each.name: each for each in TYPES}


def block_type(num_bits: int) -> BlockType:
    """The narrowest type that holds codes of ``num_bits``."""
    return next(each for each in TYPES if each.num_bits >= num_bits)


def pack_blocks(weight: CompressedWeight, name: str = "the weight") -> Bytes:
    """The blocks uint8 [rows, bytes] of a quantized weight on a symmetric grid.

    Raises:
        InputError: a scale is no number of 16 bits.
    """
    assert weight.codes is not None
    assert weight.grid is not None
    kind, codes = block_type(weight.grid.num_bits), weight.codes.numpy()
    rows, cols = codes.shape
    scale = _half_scales(weight.grid, weight.codes, name)
    per_block = np.repeat(scale, cols // BLOCK // scale.shape[1], axis=1)
    blocks = codes.reshape(rows, cols // BLOCK, BLOCK)
    whole = kind.num_bits == 8
    packed = blocks.view(np.uint8) if whole else _pack_nibbles(blocks, kind.num_bits)
    parts = [per_block[..., None].view(np.uint8), packed]
    return np.ascontiguousarray(np.concatenate(parts, axis=2)).reshape(rows, -1)


def unpack_blocks(data: Bytes, kind: BlockType) -> CompressedWeight:
    """The weight that blocks uint8 [rows, bytes] hold. Its mask is None and its error NaN: files of this
    format know neither."""
    rows = len(data)
    blocks = data.reshape(rows, -1, kind.size)
    scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    packed = np.ascontiguousarray(blocks[..., 2:])
    codes = packed.view(np.int8) if kind.num_bits == 8 else _unpack_nibbles(packed, kind.num_bits)
    grid = Grid(
        torch.from_numpy(scale.astype(np.float32)), None, kind.num_bits, BLOCK, torch.float16,
        torch.float32,
    )  # fmt: skip
    return CompressedWeight(
        None, float("nan"), torch.from_numpy(codes.reshape(rows, -1).copy()), grid
    )


def _half_scales(grid: Grid, codes: Tensor, name: str) -> npt.NDArray[np.float16]:
    """The scales float16 [rows, groups].

    Raises:
        InputError: one is no number of 16 bits; that of a group of zeros may be anything.
    """
    used = codes.view(len(codes), -1, grid.group_size).ne(0).any(dim=-1)
    scale = torch.where(used, grid.scale, torch.zeros_like(grid.scale))
    half = scale.to(torch.float16)
    wrong = half.to(torch.float32) != scale
    if bool(wrong.any()):
        value = float(scale[wrong][0])
        raise InputError(
            f"gguf stores scales as float16 and {name} has one of {value:.9g}, which is none: rounding it "
            "would change the weights, so compress the original model with --format gguf"
        )
    result: npt.NDArray[np.float16] = half.numpy()
    return result


def _pack_nibbles(codes: npt.NDArray[np.int8], num_bits: int) -> Bytes:
    """Codes [rows, blocks, 32] of 4 or 5 bits: of 5 the highest bits in 4 bytes first, then the lower four,
    those of columns i and i + 16 together."""
    unsigned = (codes + np.int8(1 << (num_bits - 1))).view(np.uint8)
    half = BLOCK // 2
    low = (unsigned[..., :half] & 15) | (unsigned[..., half:] & 15) << 4
    if num_bits == 4:
        return np.asarray(low, np.uint8)
    high = np.packbits(unsigned >> 4, axis=-1, bitorder="little")
    return np.concatenate([high, low], axis=-1)


def _unpack_nibbles(packed: Bytes, num_bits: int) -> npt.NDArray[np.int8]:
    low = packed[..., -BLOCK // 2 :]
    unsigned = np.concatenate([low & 15, low >> 4], axis=-1)
    if num_bits == 5:
        unsigned = unsigned | np.unpackbits(packed[..., :4], axis=-1, bitorder="little") << 4
    return (unsigned - np.uint8(1 << (num_bits - 1))).view(np.int8)
