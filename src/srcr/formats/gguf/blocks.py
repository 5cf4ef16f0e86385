"""Codes as llama.cpp stores them: blocks of 32 columns, each with its own scale, and super-blocks of 256
columns, whose 16 scales are whole multiples of one number.

Of ggml's types, Q4_0, Q5_0, Q8_0, Q3_K and Q6_K hold w = scale * code with codes around 0, so that a pruned
weight is an exact 0. What srcr chose is stored as it is: nothing is rounded a second time. (Layouts: ggml's
ggml-common.h.)
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from srcr.errors import InputError
from srcr.formats.checkpoint import Scheme
from srcr.numerics.compressed import CompressedWeight
from srcr.numerics.grid import Grid, code_range
from srcr.numerics.super_blocks import SUPER_BLOCK

#: Columns of a block, and of a group in a super-block.
BLOCK, GROUP = 32, 16
Bytes = npt.NDArray[np.uint8]
_TWO, _THREE, _FOUR, _FIFTEEN = map(np.uint8, (2, 3, 4, 15))


@dataclass(frozen=True)
class BlockType:
    """A type of ggml: its ``name`` there, the ``num_bits`` of a code, the ``size`` of a block in bytes, and
    the ``scale_bits`` of a scale in a super-block (None: it is none)."""

    name: str
    num_bits: int
    size: int
    scale_bits: int | None = None

    @property
    def columns(self) -> int:
        """Columns of a block."""
        return BLOCK if self.scale_bits is None else SUPER_BLOCK

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return BLOCK if self.scale_bits is None else GROUP


#: From narrow to wide.
TYPES = (
    BlockType("Q3_K", 3, 110, 6),
    BlockType("Q4_0", 4, 18),
    BlockType("Q5_0", 5, 22),
    BlockType("Q6_K", 6, 210, 8),
    BlockType("Q8_0", 8, 34),
)
BY_NAME: Mapping[str, BlockType] = {each.name: each for each in TYPES}
#: Group size and bits of a scale, by the bits of codes that are stored in super-blocks.
SUPER_BLOCKS = {2: (GROUP, 6), 3: (GROUP, 6), 6: (GROUP, 8)}


def block_type(num_bits: int, scale_bits: int | None = None) -> BlockType | None:
    """The narrowest type that holds codes of ``num_bits``, with scales of ``scale_bits`` in units of their
    super-blocks; None where there is none."""
    types = (each for each in TYPES if each.scale_bits == scale_bits and each.num_bits >= num_bits)
    return next(types, None)


def type_of(scheme: Scheme) -> BlockType:
    """The type that holds a scheme's codes, of one that the format lets pass."""
    kind = block_type(scheme.num_bits, scheme.scale_bits)
    assert kind is not None, "checked before"
    return kind


def pack_blocks(weight: CompressedWeight, name: str = "the weight") -> Bytes:
    """The blocks uint8 [rows, bytes] of a quantized weight on a symmetric grid.

    Raises:
        InputError: a scale is no number of 16 bits.
    """
    assert weight.codes is not None
    assert weight.grid is not None
    grid, codes = weight.grid, weight.codes.numpy()
    kind = block_type(grid.num_bits, grid.scale_bits)
    assert kind is not None
    rows, cols = codes.shape
    if grid.super_scale is not None:
        return _pack_super_blocks(codes, grid, kind)
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
    if kind.scale_bits is not None:
        return _unpack_super_blocks(blocks, kind)
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


def _pack_super_blocks(codes: npt.NDArray[np.int8], grid: Grid, kind: BlockType) -> Bytes:
    """Super-blocks uint8 [rows, bytes]: of Q3_K high bits, low bits, scales of 6 bits and their unit; of Q6_K
    low bits, high bits, scales of 8 bits and their unit."""
    assert grid.super_scale is not None
    lowest = np.int16(code_range(kind.num_bits)[0])
    unsigned = (codes.reshape(len(codes), -1, SUPER_BLOCK) - lowest).astype(np.uint8)
    scales = grid.multiples().numpy().astype(np.int8)
    scales = scales.reshape(*unsigned.shape[:2], SUPER_BLOCK // GROUP)
    unit = grid.super_scale.to(torch.float16).numpy()[..., None].view(np.uint8)
    if kind.num_bits == 3:
        parts = [
            _pack_ones(unsigned >> _TWO),
            _pack_twos(unsigned & _THREE),
            _pack_six(scales),
            unit,
        ]
    else:
        parts = [
            _pack_fours(unsigned & _FIFTEEN),
            _pack_twos(unsigned >> _FOUR),
            scales.view(np.uint8),
            unit,
        ]
    return np.concatenate(parts, axis=2).reshape(len(codes), -1)


def _unpack_super_blocks(blocks: Bytes, kind: BlockType) -> CompressedWeight:
    """The weight that super-blocks uint8 [rows, blocks, bytes] hold."""
    if kind.num_bits == 3:
        high, low, packed, unit = np.split(blocks, (32, 96, 108), axis=2)
        unsigned, scales = _unpack_ones(high) << 2 | _unpack_twos(low), _unpack_six(packed)
    else:
        low, high, packed, unit = np.split(blocks, (128, 192, 208), axis=2)
        unsigned, scales = _unpack_fours(low) | _unpack_twos(high) << 4, packed.view(np.int8)
    codes = (unsigned + np.int16(code_range(kind.num_bits)[0])).astype(np.int8)
    multiples = torch.from_numpy(scales.reshape(len(blocks), -1).astype(np.float32))
    grid = Grid(multiples, None, kind.num_bits, GROUP, torch.float16, torch.float32)
    units = np.ascontiguousarray(unit).view(np.float16)[..., 0].astype(np.float32)
    assert kind.scale_bits is not None
    return CompressedWeight(
        None, float("nan"), torch.from_numpy(codes.reshape(len(blocks), -1).copy()),
        grid.in_units(torch.from_numpy(units), kind.scale_bits),
    )  # fmt: skip


def _parts(values: Bytes, *shape: int) -> Bytes:
    """Values [rows, blocks, n] with their last axis split."""
    return values.reshape(*values.shape[:2], *shape)


def _joined(fields: Bytes, axis: int, bits: int) -> Bytes:
    """Fields of so many bits joined along an axis, the first lowest, as [rows, blocks, bytes]."""
    result: Bytes = np.zeros_like(np.take(fields, 0, axis))
    for number in range(fields.shape[axis]):
        result |= np.take(fields, number, axis) << np.uint8(bits * number)
    return _parts(result, -1)


def _fields(packed: Bytes, axis: int, bits: int, count: int) -> Bytes:
    """What :func:`_joined` joined, along a new axis; flat, as [rows, blocks, values]."""
    mask = np.uint8((1 << bits) - 1)
    fields = [packed >> np.uint8(bits * number) & mask for number in range(count)]
    return _parts(np.stack(fields, axis), -1)


# Of the 256 columns of a super-block, the halves of 128 follow each other; in each half, columns 32 apart
# share a byte of two-bit fields, and columns 64 apart one of four-bit fields. Of one-bit fields columns 32
# apart in both halves share a byte.
def _pack_ones(values: Bytes) -> Bytes:
    return _joined(_parts(values, 8, 32), 2, 1)


def _unpack_ones(packed: Bytes) -> Bytes:
    return _fields(packed, 2, 1, 8)


def _pack_twos(values: Bytes) -> Bytes:
    return _joined(_parts(values, 2, 4, 32), 3, 2)


def _unpack_twos(packed: Bytes) -> Bytes:
    return _fields(_parts(packed, 2, 32), 3, 2, 4)


def _pack_fours(values: Bytes) -> Bytes:
    return _joined(_parts(values, 2, 2, 64), 3, 4)


def _unpack_fours(packed: Bytes) -> Bytes:
    return _fields(_parts(packed, 2, 64), 3, 4, 2)


def _pack_six(scales: npt.NDArray[np.int8]) -> Bytes:
    """16 scales of 6 bits: the lower four of scales 8 apart in a byte, the upper two of scales 4 apart."""
    unsigned = (scales + np.int8(32)).view(np.uint8)
    low, high = _parts(unsigned & _FIFTEEN, 2, 8), _parts(unsigned >> _FOUR, 4, 4)
    return np.concatenate([_joined(low, 2, 4), _joined(high, 2, 2)], axis=2)


def _unpack_six(packed: Bytes) -> npt.NDArray[np.int8]:
    low, high = packed[..., :8], packed[..., 8:]
    unsigned = _fields(low, 2, 4, 2) | _fields(high, 2, 2, 4) << 4
    return unsigned.view(np.int8) - np.int8(32)
