"""SparseGPT: Optimal Brain Surgeon saliency, the error pushed into the weights still to come.

In a joint pass a kept weight is rounded, which has a cost of its own: what pruning costs is then the
*difference* between the two, so that a weight that would round to zero anyway goes first, for free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from srcr.methods import Pruner

if TYPE_CHECKING:
    from torch import Tensor


def _scores(W: Tensor, diagonal: Tensor, pivots: Tensor, rounded: Tensor | None) -> Tensor:
    from srcr.numerics import saliency

    if rounded is None:
        return saliency.obs(W, pivots)
    return (2 * W - rounded).mul_(rounded).div_(pivots**2)  # W^2 - (W - rounded)^2, per pivot^2


METHOD = Pruner(
    name="sparsegpt",
    summary="Optimal Brain Surgeon saliency with error compensation",
    paper="Frantar & Alistarh 2023, arXiv 2301.00774",
    scores=_scores,
    scope="layer",
    compensates=True,
)
