"""What it costs to remove a weight: one score [rows, cols] a criterion, lowest goes first."""

import torch
from torch import Tensor


def magnitude(W: Tensor) -> Tensor:
    """``|w|``."""
    return W.abs()


def wanda(W: Tensor, diagonal: Tensor) -> Tensor:
    """``|w| * ||x_j||`` with ``||x_j||^2 = diag(H)`` [cols] (Sun et al., arXiv 2306.11695, eq. 1)."""
    return W.abs() * diagonal.clamp_min(0).sqrt()


def obs(W: Tensor, pivots: Tensor) -> Tensor:
    """``w^2 / [H^-1]_jj`` over the columns not yet swept (Optimal Brain Surgeon; SparseGPT eq. 5).

    ``pivots`` [cols] is the diagonal of the upper factor of the inverse Hessian: its square is
    ``[H^-1]_jj`` once all columns before j are fixed.
    """
    return torch.square(W / pivots)
