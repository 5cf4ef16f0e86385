"""GPTQ: column by column, the rounding error pushed into the columns still to come.

Scales are searched for the lowest error of the surviving weights, weighted by the Hessian's diagonal.
"""

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
    return fit_grid(W, spec.num_bits, group_size, spec.symmetric, dtype, importance, keep)


METHOD = Quantizer(
    name="gptq",
    summary="error compensation column by column, searched scales",
    paper="Frantar et al. 2022, arXiv 2210.17323",
    fit=_fit,
    compensates=True,
)
