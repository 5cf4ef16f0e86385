"""The factor of a damped inverse Hessian, along which a sweep walks; computed in place."""

from dataclasses import dataclass

import torch
from torch import Tensor

from srcr.errors import NumericalError
from srcr.numerics.tensors import is_finite

MAX_DAMPENING = 1.0
#: Columns that the in-place factorisations handle at a time.
BLOCK = 512


@dataclass(frozen=True, eq=False)
class CholeskyFactor:
    """The damped inverse Hessian in the order in which columns are swept.

    ``upper`` [cols, cols] is upper triangular with ``upper^T upper = (P (H + damp I) P^T)^-1``,
    ``order`` [cols] the permutation P (column ``order[i]`` is swept i-th), ``diagonal`` [cols] the
    undamped ``diag(H)`` in the original column order, ``damp`` the number added to the diagonal and
    ``dampening_frac`` that number as a fraction of the mean diagonal.
    """

    upper: Tensor
    order: Tensor
    diagonal: Tensor
    damp: float
    dampening_frac: float


def factorize(
    H: Tensor, order: Tensor | None = None, dampening_frac: float = 0.01
) -> CholeskyFactor:
    """The factor of the damped inverse of ``H`` [cols, cols], with columns swept in ``order``.

    One Cholesky and one triangular inverse: with J the reversal, ``J H J = L L^T`` gives
    ``H^-1 = U^T U`` for the upper triangular ``U = J L^-1 J``. Damping is multiplied by 10 until the
    factorisation succeeds (first in float32, then in float64). ``H`` is left as it is; besides the result
    it takes the memory of a quarter of a matrix, unless float64 is needed.

    Raises:
        NumericalError: ``H`` is not finite, or not positive definite even with damping equal to the
            mean diagonal.
    """
    diagonal = H.diagonal().clone()
    if not is_finite(H):
        raise NumericalError("the Hessian is not finite (NaN or infinite activations)")
    if order is None:
        order = torch.arange(H.shape[0], device=H.device)
    mean = float(diagonal.mean())
    if mean <= 0:  # no input ever reached this layer: every direction costs the same
        mean, H = 1.0, torch.zeros_like(H)
    backwards = order.flip(0)
    frac = dampening_frac
    while True:
        for dtype in (torch.float32, torch.float64):
            lower = _permuted(H, backwards, dtype)
            lower.diagonal().add_(frac * mean)
            if cholesky_(lower):
                invert_lower_(lower)
                if is_finite(lower):
                    upper = _reversed_(lower.to(torch.float32))
                    return CholeskyFactor(upper, order, diagonal, frac * mean, frac)
            del lower  # before the next is made
        if frac >= MAX_DAMPENING:
            break
        frac = min(max(frac * 10, 1e-6), MAX_DAMPENING)
    raise NumericalError(
        f"the Hessian could not be factorised even with dampening_frac {MAX_DAMPENING}; "
        "use more or more varied calibration data"
    )


def cholesky_(A: Tensor) -> bool:
    """Whether ``A`` [n, n] is positive definite; its lower triangle becomes ``L`` with ``L L^T = A``, the
    rest zero, in place. ``A`` is spoilt where it is not."""
    n = len(A)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        corner, info = torch.linalg.cholesky_ex(A[start:stop, start:stop])
        if int(info):
            return False
        A[start:stop, start:stop] = corner
        below = A[stop:, start:stop]
        below.copy_(torch.linalg.solve_triangular(corner.T, below, upper=True, left=False))
        for left in range(stop, n, BLOCK):  # what lies above the diagonal is not needed
            A[left:, left : left + BLOCK].addmm_(
                below[left - stop :], below[left - stop : left - stop + BLOCK].T, alpha=-1
            )
    A.tril_()
    return True


def invert_lower_(L: Tensor) -> None:
    """Invert the lower triangular ``L`` [n, n] in place: the inverse of ``[[A, 0], [B, C]]`` is
    ``[[A^-1, 0], [-C^-1 B A^-1, C^-1]]``."""
    n = len(L)
    if n <= BLOCK:
        eye = torch.eye(n, dtype=L.dtype, device=L.device)
        L.copy_(torch.linalg.solve_triangular(L, eye, upper=False))
        return
    half = n // 2
    invert_lower_(L[:half, :half])
    invert_lower_(L[half:, half:])
    for start in range(0, half, BLOCK):  # B A^-1 by columns: B to the left is not needed again
        stop = min(start + BLOCK, half)
        B = L[half:, start:half] @ L[start:half, start:stop]
        L[half:, start:stop] = (L[half:, half:] @ B).neg_()


def _permuted(H: Tensor, order: Tensor, dtype: torch.dtype) -> Tensor:
    """``P H P^T`` as a new matrix, made without another one in between."""
    out = torch.empty(H.shape, dtype=dtype, device=H.device)
    for start in range(0, len(order), BLOCK):
        out[start : start + BLOCK] = H[order[start : start + BLOCK]].index_select(1, order)
    return out


def _reversed_(matrix: Tensor) -> Tensor:
    """``J A J`` in place: the order of rows and columns reversed."""
    flat = matrix.view(-1)
    n, step = len(flat), BLOCK * len(matrix)
    for start in range(0, n // 2, step):
        stop = min(start + step, n // 2)
        head = flat[start:stop].flip(0)
        flat[start:stop] = flat[n - stop : n - start].flip(0)
        flat[n - stop : n - start] = head
    return matrix
