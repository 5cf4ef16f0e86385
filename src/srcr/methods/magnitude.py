"""Magnitude pruning: the smallest weights of a layer go, the others stay as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from srcr.methods import Pruner

if TYPE_CHECKING:
    from torch import Tensor


def _scores(W: Tensor, diagonal: Tensor, pivots: Tensor, rounded: Tensor | None) -> Tensor:
    from srcr.numerics import saliency

    return saliency.magnitude(W)


METHOD = Pruner(
    name="magnitude",
    summary="smallest weights of a layer, no compensation",
    paper="Han et al. 2015, arXiv 1506.02626",
    scores=_scores,
    scope="layer",
    compensates=False,
)
