"""What every part of the numerics needs: matrices in parts, finiteness, names of precisions."""

import math
from collections.abc import Iterator
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

#: Numbers that are worked on at a time where rows do not depend on each other.
CHUNK_ELEMENTS = 1 << 21
#: Columns at a time of a symmetric matrix, of which about half is computed.
PANEL = 256


def dtype_name(dtype: torch.dtype) -> str:
    """A precision as config.json names it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def row_chunks(
    matrix: Tensor | npt.NDArray[Any], elements: int = CHUNK_ELEMENTS
) -> Iterator[slice]:
    """Slices of the rows of ``matrix`` [rows, cols], each about ``elements`` numbers and at least a row."""
    step = max(1, elements // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), step):
        yield slice(start, min(start + step, len(matrix)))


def lower_panels(size: int) -> Iterator[tuple[slice, slice]]:
    """(rows, columns) of panels that together hold all on and below the diagonal of a matrix [size, size]."""
    for start in range(0, size, PANEL):
        yield slice(start, size), slice(start, min(start + PANEL, size))


def as_bytes(tensor: Tensor) -> Tensor:
    """The numbers of ``tensor`` as uint8 [bytes], in order; its own memory where that is in order."""
    flat = tensor.contiguous().reshape(-1)
    if flat.stride(0) != 1:  # a single number, which counts as contiguous however it strides
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def is_finite(tensor: Tensor) -> bool:
    """Whether every number of ``tensor`` is finite: whether its extremes are, which are NaN if any is."""
    if not tensor.numel():
        return True
    lowest, highest = torch.aminmax(tensor)
    return math.isfinite(lowest) and math.isfinite(highest)
