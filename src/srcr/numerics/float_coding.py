"""Floating-point tensors without what their exponents waste.

The bits of each number are rotated by one, sign last: then the first byte is the exponent (and, of float16,
the first bits of the fraction), which is coded by its frequency, and the others are noise, which is kept.
"""

import math
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from srcr.errors import InputError
from srcr.numerics.coding import decode_symbols, encode_symbols
from srcr.numerics.tensors import as_bytes

#: Numbers below which tables do not pay.
SMALL = 512
#: How a tensor is coded: as it is; by its bytes; by its bytes, those of zeros left out.
RAW, PLANES, SPARSE = 0, 1, 2
#: Share of zeros from which on their bytes are left out.
ZEROS = 0.02
_HEADER = struct.Struct("<BQ")
_INTEGERS: dict[int, np.dtype[Any]] = {n: np.dtype(f"<u{n}") for n in (2, 4, 8)}


def encode_floats(tensor: Tensor) -> bytes:
    """The code of a tensor of any shape and precision, which :func:`decode_floats` reads to the bit."""
    data = as_bytes(tensor).numpy()
    itemsize = tensor.element_size()
    if tensor.numel() < SMALL or not tensor.is_floating_point() or itemsize not in _INTEGERS:
        return _HEADER.pack(RAW, len(data)) + data.tobytes()
    bits = data.view(_INTEGERS[itemsize])
    rotated = bits << 1 | bits >> 8 * itemsize - 1
    planes = rotated.view(np.uint8).reshape(-1, itemsize)
    exponents, rest = np.ascontiguousarray(planes[:, -1]), planes[:, :-1]
    mode = PLANES
    if np.count_nonzero(bits == 0) >= ZEROS * len(bits) and not bits[exponents == 0].any():
        mode, rest = SPARSE, rest[exponents != 0]
    coded = encode_symbols(exponents.reshape(_matrix(tuple(tensor.shape))))
    return _HEADER.pack(mode, len(coded)) + coded + np.ascontiguousarray(rest).tobytes()


def decode_floats(data: bytes, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor that was coded.

    Raises:
        InputError: the code is none of such a tensor.
    """
    if len(data) < _HEADER.size:
        raise InputError("a coded tensor ends early")
    mode, length = _HEADER.unpack_from(data)
    body, count, itemsize = data[_HEADER.size :], math.prod(shape), dtype.itemsize
    if mode == RAW:
        if len(body) != count * itemsize or length != len(body):
            raise InputError("a coded tensor has another size than its shape says")
        plain = np.frombuffer(bytearray(body), np.uint8)
    else:
        plain = _join(mode, body, length, shape, itemsize)
    return torch.from_numpy(plain).view(dtype).view(shape)


def _join(
    mode: int, body: bytes, length: int, shape: tuple[int, ...], itemsize: int
) -> npt.NDArray[np.uint8]:
    if mode not in (PLANES, SPARSE) or itemsize not in _INTEGERS:
        raise InputError("a coded tensor is of a kind that is not known")
    exponents = decode_symbols(body[:length], _matrix(shape)).ravel()
    rest = np.frombuffer(body[length:], np.uint8)
    there = exponents != 0 if mode == SPARSE else np.ones(len(exponents), np.bool_)
    if len(rest) != int(there.sum()) * (itemsize - 1):
        raise InputError("a coded tensor has another size than its shape says")
    planes = np.zeros((len(exponents), itemsize), np.uint8)
    planes[there, :-1] = rest.reshape(-1, itemsize - 1)
    planes[:, -1] = exponents
    rotated = planes.reshape(-1).view(_INTEGERS[itemsize])
    bits: npt.NDArray[np.uint8] = (rotated >> 1 | rotated << 8 * itemsize - 1).view(np.uint8)
    return bits


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor, whatever its dimensions."""
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)
