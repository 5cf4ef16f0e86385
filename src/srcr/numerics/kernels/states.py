"""What the steps within a block of columns work on."""

from dataclasses import dataclass

from torch import Tensor

from srcr.numerics.grid import Grid

#: A swap gains at least so much of what the weight that goes was worth: less is rounding.
LEAST_GAIN = 1e-5


@dataclass(frozen=True, eq=False)
class SweepState:
    """A sweep under way, everything contiguous and with its columns in the order of the sweep.

    ``weight`` [rows, cols] float32: the weights moved by the errors so far, and the final values of the
    columns that are done; ``upper`` [cols, cols]: the factor; ``order`` [cols]: where each column stands in
    the matrix, and so on the ``grid``; ``codes`` int8 [rows, cols] or None without a grid; ``mask`` bool
    [rows, cols] or None; ``errors`` [rows, block] of the block's columns; ``propagate``: whether what has
    reached a pruned weight is pushed on.
    """

    weight: Tensor
    upper: Tensor
    order: Tensor
    codes: Tensor | None
    mask: Tensor | None
    errors: Tensor
    grid: Grid | None
    propagate: bool


@dataclass(frozen=True, eq=False)
class DescentState:
    """A round of coordinate descent under way, as :class:`SweepState`.

    ``pull`` [rows, cols] float32: ``(target - weight) damped``, spoilt by a step; ``damped`` [cols, cols]:
    the damped Hessian; a step is given those of its own columns only; ``weight`` [rows, cols]: the result.
    Columns are in the order of the file.
    """

    pull: Tensor
    damped: Tensor
    weight: Tensor
    codes: Tensor | None
    mask: Tensor | None
    grid: Grid | None
