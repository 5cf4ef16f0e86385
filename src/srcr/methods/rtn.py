"""Round to nearest: the range of the weights decides the grid, nothing is compensated."""

import torch
from torch import Tensor

from srcr.methods import Quantizer
from srcr.numerics.grid import Grid, fit_grid
from srcr.types import QuantSpec


def _fit(
    W: Tensor,
    spec: QuantSpec,
    group_size: int,
    dtype: torch.dtype,
    importance: Tensor,
    keep: Tensor | None,
) -> Grid:
    return fit_grid(W, spec.num_bits, group_size, spec.symmetric, dtype, keep=keep, search=False)


METHOD = Quantizer(
    name="rtn",
    summary="round to nearest on the weights' own range, no compensation",
    paper="the common baseline",
    fit=_fit,
    compensates=False,
)
