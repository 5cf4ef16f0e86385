"""Round to nearest: the range of the weights decides the grid, nothing is compensated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from srcr.methods import Quantizer

if TYPE_CHECKING:
    from torch import Tensor

    from srcr.numerics.grid import Grid, GridSpec


def _fit(W: Tensor, spec: GridSpec, importance: Tensor, mask: Tensor | None) -> Grid:
    from srcr.numerics.scales import fit_grid

    return fit_grid(W, spec, mask=mask, shrinks=())


METHOD = Quantizer(
    name="rtn",
    summary="round to nearest on the weights' own range, no compensation",
    paper="the common baseline",
    fit=_fit,
    compensates=False,
)
