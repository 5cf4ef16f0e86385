"""Small integers packed without gaps, for files: 8 of them take as many bytes as each has bits."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

#: Numbers packed at a time, a multiple of 8: their 64-bit words stay in the cache.
CHUNK_ELEMENTS = 1 << 18


def pack(values: Tensor, num_bits: int) -> Tensor:
    """``values`` uint8 of any shape, each below ``2^num_bits``, as uint8 [bytes]."""
    flat = values.reshape(-1).numpy()
    packed = np.empty(packed_bytes(flat.size, num_bits), np.uint8)
    for first, last in _chunks(flat.size):
        part = np.zeros(-(-(last - first) // 8) * 8, np.uint8)
        part[: last - first] = flat[first:last]
        words = np.zeros(part.size // 8, "<u8")
        for place, column in enumerate(part.reshape(-1, 8).T):
            words |= column.astype("<u8") << np.uint64(place * num_bits)
        start = first // 8 * num_bits
        data = words.view(np.uint8).reshape(-1, 8)[:, :num_bits].reshape(-1)
        packed[start : start + data.size] = data
    return torch.from_numpy(packed)


def unpack(packed: Tensor, num_bits: int, shape: tuple[int, ...]) -> Tensor:
    """The uint8 values of this ``shape`` that :func:`pack` made ``packed`` of.

    Raises:
        ValueError: ``packed`` does not have as many bytes.
    """
    size = int(np.prod(shape))
    if packed.numel() != packed_bytes(size, num_bits):
        raise ValueError(f"{packed.numel()} bytes do not hold {size} values of {num_bits} bits")
    data = packed.numpy().reshape(-1, num_bits)
    values = np.empty(size, np.uint8)
    low = np.uint64((1 << num_bits) - 1)
    for first, last in _chunks(size):
        rows = data[first // 8 : -(-last // 8)]
        bytes_of_words = np.zeros((len(rows), 8), np.uint8)
        bytes_of_words[:, :num_bits] = rows
        words = bytes_of_words.view("<u8")[:, 0]
        part = np.empty((len(rows), 8), np.uint8)
        for place in range(8):
            part[:, place] = (words >> np.uint64(place * num_bits)) & low
        values[first:last] = part.reshape(-1)[: last - first]
    return torch.from_numpy(values).view(shape)


def packed_bytes(size: int, num_bits: int) -> int:
    """Bytes of ``size`` packed numbers: whole eights of them."""
    return -(-size // 8) * num_bits


def _chunks(size: int) -> Iterator[tuple[int, int]]:
    for first in range(0, size, CHUNK_ELEMENTS):
        yield first, min(first + CHUNK_ELEMENTS, size)
