"""The fastest implementation that a device has of each step."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from srcr.environment import is_intel
from srcr.numerics.grid import Grid, GridSpec
from srcr.numerics.kernels.states import DescentState, SweepState

#: ``(state, start, columns to fix, stop)``: fix these columns of the block ``start:stop``, and push
#: their errors on to its end.
FixColumns = Callable[[SweepState, int, slice, int], None]
#: ``(state, start, stop)``: move the columns of the block, each in its turn.
StepColumns = Callable[[DescentState, int, int], None]
#: ``(state, damp, limit)``, as :func:`srcr.numerics.swaps.swap_rows`.
SwapRows = Callable[[DescentState, float, int], None]
#: ``(matrix [rows, cols], order [cols])``: put the columns in this order, in place.
PermuteColumns = Callable[[Tensor, Tensor], None]
#: ``(W, spec, importance, mask, shrinks) -> Grid``, as :func:`srcr.numerics.scales.search_scales`.
ScaleSearch = Callable[[Tensor, GridSpec, Tensor | None, Tensor | None, Sequence[float]], Grid]


class Kernels(Protocol):
    """What the module of a device defines."""

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


class Moments(Protocol):
    """Sums of products over the rows of bfloat16 matrices: exact products, summed in float32."""

    @property
    def ENGINE(self) -> str:  # noqa: N802 (a constant of the module)
        """What multiplies: a library or an instruction."""
        ...

    def accumulate(self, moment: Tensor, left: Tensor, right: Tensor) -> None:
        """As :func:`srcr.numerics.moments.accumulate`."""
        ...

    def accumulate_gram(self, moment: Tensor, x: Tensor) -> None:
        """As :func:`srcr.numerics.moments.accumulate_gram`."""
        ...


def kernels_for(device: torch.device) -> Kernels | None:
    """The compiled steps for a device; None where there are none, and the reference has to do."""
    if device.type == "cpu":
        from srcr.numerics.kernels import cpu

        return cpu
    if device.type == "cuda" and find_spec("triton"):  # torch's builds for CUDA bring it
        from srcr.numerics.kernels import cuda

        return cuda
    return None


def moments_for(*matrices: Tensor) -> Moments | None:
    """Compiled sums of products of these matrices; None where there are none, or they are not bfloat16."""
    if any(x.device.type != "cpu" or x.dtype != torch.bfloat16 for x in matrices):
        return None
    if is_intel():  # where MKL beats the instruction, in float32 too (benchmarks/moments.py)
        from srcr.numerics.kernels import mkl_moments

        return mkl_moments if mkl_moments.available() else None
    from srcr.numerics.kernels import cpu_moments

    return cpu_moments if cpu_moments.available() else None


def scale_search_for(device: torch.device) -> ScaleSearch | None:
    """The compiled search of scales for a device; None where there is none."""
    if device.type == "cpu":
        from srcr.numerics.kernels import cpu_scales

        return cpu_scales.search_scales
    return None


def swaps_for(device: torch.device) -> SwapRows | None:
    """The compiled swaps of a mask for a device; None where there are none."""
    if device.type == "cpu":
        from srcr.numerics.kernels import cpu_swaps

        return cpu_swaps.swap_rows
    return None


def permute_columns(matrix: Tensor, order: Tensor) -> Tensor:
    """``matrix`` [rows, cols], contiguous, with its columns put in this ``order`` [cols] in place."""
    kernels = kernels_for(matrix.device)
    if kernels:
        kernels.permute_columns(matrix, order)
    else:
        matrix.copy_(matrix.index_select(1, order))
    return matrix


def kth_smallest(flat: Tensor, k: int) -> float:
    """The number at place ``k`` (from 0) of ``flat`` [n] in rising order."""
    if flat.device.type == "cpu" and flat.dtype == torch.float32:
        from srcr.numerics.kernels import cpu_select

        return cpu_select.kth_smallest(flat, k)
    if flat.device.type == "cuda":  # whose kthvalue keeps to a single multiprocessor
        return float(flat.sort().values[k])
    return float(flat.kthvalue(k + 1).values)
