"""Wanda: weight times input norm, compared within each output row, the others stay as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from srcr.methods import Pruner

if TYPE_CHECKING:
    from torch import Tensor


def _scores(W: Tensor, diagonal: Tensor, pivots: Tensor, rounded: Tensor | None) -> Tensor:
    from srcr.numerics import saliency

    return saliency.wanda(W, diagonal)


METHOD = Pruner(
    name="wanda",
    summary="smallest |weight| x input norm of each row, no compensation",
    paper="Sun et al. 2023, arXiv 2306.11695",
    scores=_scores,
    scope="row",
    compensates=False,
)
