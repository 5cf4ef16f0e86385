"""The steps within a block of columns: what they work on, and the fastest that a device has.

Within a block the rows are independent: a column is fixed, and its error reaches the rest of the block.
:mod:`srcr.numerics.obs` and :mod:`srcr.numerics.descent` hold the reference in PyTorch, which runs
anywhere; the modules here are drop-in and tested against it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from srcr.numerics.grid import Grid


@dataclass(frozen=True, eq=False)
class Sweep:
    """A sweep under way, everything contiguous and with its columns in the order of the sweep.

    ``work`` [rows, cols] float32: the weights moved by the errors so far, and what those behind became;
    ``upper`` [cols, cols]: the factor; ``order`` [cols]: where each column stands in the matrix, and so on
    the ``grid``; ``codes`` int8 [rows, cols] or None without a grid; ``keep`` bool [rows, cols] or None;
    ``errors`` [rows, block] of the block's columns; ``push``: whether what has reached a pruned weight is
    pushed on.
    """

    work: Tensor
    upper: Tensor
    order: Tensor
    codes: Tensor | None
    keep: Tensor | None
    errors: Tensor
    grid: Grid | None
    push: bool


@dataclass(frozen=True, eq=False)
class Descent:
    """A pass of coordinate descent under way, as :class:`Sweep`.

    ``pull`` [rows, cols] float32: ``(target - weight) @ damped``; ``damped`` [block, at least block]: of
    the damped Hessian the rows of the block's columns, from its first column on; ``weight`` [rows, cols]:
    the result; ``steps`` [rows, block]: how far the block's columns have moved.
    """

    pull: Tensor
    damped: Tensor
    order: Tensor
    weight: Tensor
    codes: Tensor | None
    keep: Tensor | None
    steps: Tensor
    grid: Grid | None


#: ``(state, start, columns to fix, stop)``: fix these columns of the block ``start:stop``, and push
#: their errors on to its end.
FixColumns = Callable[[Sweep, int, slice, int], None]
#: ``(state, start, stop)``: move the columns of the block, one by one.
StepColumns = Callable[[Descent, int, int], None]


#: ``(W, num_bits, group_size, symmetric, dtype, importance, keep, shrinks) -> Grid``: search the scales.
FitRows = Callable[
    [Tensor, int, int, bool, torch.dtype, Tensor | None, Tensor | None, Sequence[float]], Grid
]


#: ``(matrix [rows, cols], order [cols])``: put the columns in this order, in place.
PermuteColumns = Callable[[Tensor, Tensor], None]


class Kernels(Protocol):
    """What a module of this folder defines."""

    @property
    def permute_columns(self) -> PermuteColumns:
        """As :func:`permute_columns`."""
        ...

    @property
    def fix_columns(self) -> FixColumns:
        """As :func:`srcr.numerics.obs.fix_columns`."""
        ...

    @property
    def step_columns(self) -> StepColumns:
        """As :func:`srcr.numerics.descent.step_columns`."""
        ...


def permute_columns(matrix: Tensor, order: Tensor) -> Tensor:
    """Put the columns of ``matrix`` [rows, cols], contiguous, in this ``order`` [cols], in place; returns
    it."""
    kernels = kernels_for(matrix.device)
    if kernels:
        kernels.permute_columns(matrix, order)
    else:
        select_columns(matrix, order)
    return matrix


def select_columns(matrix: Tensor, order: Tensor) -> None:
    """The reference of :func:`permute_columns`: through a copy."""
    matrix.copy_(matrix.index_select(1, order))


def kth_smallest(flat: Tensor, k: int) -> float:
    """The number at place ``k`` (from 0) of ``flat`` [n] in rising order."""
    if flat.device.type == "cpu" and flat.dtype == torch.float32:
        from srcr.numerics.kernels import cpu_select

        return cpu_select.kth_smallest(flat, k)
    return float(flat.kthvalue(k + 1).values)


class Moments(Protocol):
    """Sums of products over the rows of bfloat16 matrices."""

    def accumulate(self, moment: Tensor, left: Tensor, right: Tensor) -> None:
        """As :func:`srcr.numerics.hessian.accumulate`."""
        ...

    def accumulate_gram(self, moment: Tensor, x: Tensor) -> None:
        """As :func:`srcr.numerics.hessian.accumulate_gram`."""
        ...


def moments_for(*matrices: Tensor) -> Moments | None:
    """Compiled sums of products of these matrices; None where there are none, or they are not bfloat16."""
    if all(x.device.type == "cpu" and x.dtype == torch.bfloat16 for x in matrices):
        from srcr.numerics.kernels import cpu_moments

        return cpu_moments if cpu_moments.available() else None
    return None


def kernels_for(device: torch.device) -> Kernels | None:
    """The compiled steps for a device; None where there are none, and the reference has to do."""
    if device.type == "cpu":
        from srcr.numerics.kernels import cpu

        return cpu
    if device.type == "cuda" and find_spec("triton"):  # torch's builds for CUDA bring it
        from srcr.numerics.kernels import cuda

        return cuda
    return None


def fit_rows_for(device: torch.device) -> FitRows | None:
    """:func:`srcr.numerics.grid.fit_rows`, compiled for a device; None where it is not."""
    if device.type == "cpu":
        from srcr.numerics.kernels import cpu_scales

        return cpu_scales.fit_rows
    return None
