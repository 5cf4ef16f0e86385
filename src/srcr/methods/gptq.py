"""GPTQ: column by column, the rounding error pushed into the columns still to come.

Scales are searched for the lowest error of the surviving weights, weighted by the Hessian's diagonal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from srcr.methods import Quantizer

if TYPE_CHECKING:
    from torch import Tensor

    from srcr.numerics.grid import Grid, GridSpec


def _fit(W: Tensor, spec: GridSpec, importance: Tensor, mask: Tensor | None) -> Grid:
    from srcr.numerics.scales import fit_grid

    return fit_grid(W, spec, importance, mask)


METHOD = Quantizer(
    name="gptq",
    summary="error compensation column by column, searched scales",
    paper="Frantar et al. 2022, arXiv 2210.17323",
    fit=_fit,
    compensates=True,
)
