r"""Second moments of a layer's inputs, and the factor of their inverse that the sweep walks along.

For a linear layer ``y = W x`` and inputs ``X`` [n, cols], the squared output error of a change
``dW`` is ``tr(dW H dW^T)`` with the Hessian ``H = X^T X`` (Frantar & Alistarh, SparseGPT,
arXiv 2301.00774, section 3; GPTQ, arXiv 2210.17323, eq. 2).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from srcr.errors import NumericalError
from srcr.numerics.kernels import moments_for, permute_columns
from srcr.numerics.products import product

MAX_DAMPENING = 1.0
#: How far targets go from the dense weights towards those of the regression, which knows the calibration
#: data too well: found by measuring (docs/decisions/009).
TARGET_STEP = 0.8
#: Columns that the in-place factorisations handle at a time.
BLOCK = 512
#: Columns at a time of a symmetric product, of which about half is computed.
PANEL = 256
#: Numbers that are worked on at a time where rows do not depend on each other.
PART = 1 << 21


@dataclass(frozen=True, eq=False)
class Factor:
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


def accumulate(moment: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left^T right`` to ``moment`` [rows, cols] float32 in place; inputs are [n, rows] and [n, cols].

    Always summed in float32: libraries round products of 16-bit inputs to 16 bits, and a token with
    activations far above all others (as the first of a sequence often has) would bury the rest under its
    own rounding.
    """
    compiled = moments_for(left, right)
    if compiled:
        compiled.accumulate(moment, left, right)
        return
    moment.addmm_(left.to(torch.float32).T, right.to(torch.float32))


def accumulate_gram(moment: Tensor, x: Tensor) -> None:
    """Add ``x^T x`` to ``moment`` [cols, cols] float32 in place, on and below the diagonal;
    :func:`mirror_` completes it. ``x`` is [n, cols]."""
    compiled = moments_for(x)
    if compiled:
        compiled.accumulate_gram(moment, x)
        return
    x = x.to(torch.float32)
    for start in range(0, len(moment), PANEL):
        stop = start + PANEL
        accumulate(moment[start:, start:stop], x[:, start:], x[:, start:stop])


def mirror_(moment: Tensor) -> None:
    """What stands below the diagonal also above it, in place."""
    for start in range(0, len(moment), PANEL):
        stop = start + PANEL
        corner = moment[start:stop, start:stop]
        corner.copy_(corner.tril() + corner.tril(-1).T)
        moment[start:stop, stop:] = moment[stop:, start:stop].T


def activation_order(diagonal: Tensor, multiple: int = 1) -> Tensor:
    """Columns by falling ``diag(H)``, so that what matters most is rounded while most can repair it.

    With ``multiple`` M > 1, whole groups of M neighbours move together (by their summed diagonal),
    which keeps N:M groups intact. Returns the permutation [cols].
    """
    groups = diagonal.reshape(-1, multiple).sum(dim=1)
    order = torch.argsort(groups, descending=True, stable=True)
    offsets = torch.arange(multiple, device=diagonal.device)
    return (order[:, None] * multiple + offsets).reshape(-1)


def factorize(H: Tensor, order: Tensor | None = None, dampening_frac: float = 0.01) -> Factor:
    """Factorise the damped inverse of ``H`` [cols, cols], sweeping columns in ``order``.

    One Cholesky and one triangular inverse: with J the reversal, ``J H J = L L^T`` gives
    ``H^-1 = U^T U`` for the upper triangular ``U = J L^-1 J``. Damping is multiplied by 10 until the
    factorisation succeeds (first in float32, then in float64). ``H`` is left as it is; besides the result
    it takes room for a quarter of a matrix, unless float64 is needed.

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
                    return Factor(upper, order, diagonal, frac * mean, frac)
            del lower  # before the next is made
        if frac >= MAX_DAMPENING:
            break
        frac = min(max(frac * 10, 1e-6), MAX_DAMPENING)
    raise NumericalError(
        f"the Hessian could not be factorised even with dampening_frac {MAX_DAMPENING}; "
        "use more or more varied calibration data"
    )


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


def cholesky_(A: Tensor) -> bool:
    """Cholesky in place: the lower triangle of ``A`` [n, n] becomes ``L`` with ``L L^T = A``, the rest
    zero. False (and ``A`` spoilt) where ``A`` is not positive definite."""
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
    """The inverse of the lower triangular ``L`` [n, n], in place: that of ``[[A, 0], [B, C]]`` is
    ``[[A^-1, 0], [-C^-1 B A^-1, C^-1]]``."""
    n = len(L)
    if n <= BLOCK:
        eye = torch.eye(n, dtype=L.dtype, device=L.device)
        L.copy_(torch.linalg.solve_triangular(L, eye, upper=False))
        return
    half = n // 2
    invert_lower_(L[:half, :half])
    invert_lower_(L[half:, half:])
    for start in range(
        0, half, BLOCK
    ):  # B A^-1 by columns: those of B to the left are not needed again
        stop = min(start + BLOCK, half)
        B = L[half:, start:half] @ L[start:half, start:stop]
        L[half:, start:stop] = (L[half:, half:] @ B).neg_()


def dense_target(W: Tensor, pulled: Tensor, factor: Factor) -> Tensor:
    r"""The weights that best reproduce the dense model's outputs from the compressed model's inputs.

    ``|X W'^T - X_d W^T|^2 + damp |W' - W|^2`` with X the inputs the compressed model sees and X_d those of
    the dense one is least at ``W' = W (X_d^T X + damp I)(X^T X + damp I)^-1`` (the closed form behind
    GPTAQ, arXiv 2504.02692); returned is ``W + TARGET_STEP (W' - W)``. ``W`` is [rows, cols], ``pulled =
    W X_d^T X`` [rows, cols], whose memory becomes the result's; ``factor`` is that of ``X^T X``, of the
    same tokens.
    """
    upper, order = factor.upper, factor.order
    for part in row_parts(W):
        right = pulled[part].add(W[part], alpha=factor.damp)[:, order]
        pulled[part] = product(product(right, upper.T), upper)
    return permute_columns(pulled, torch.argsort(order)).lerp_(W, 1 - TARGET_STEP)


def output_error(delta: Tensor, H: Tensor) -> float:
    """``tr(delta H delta^T)``: the squared output error of a weight change ``delta`` [rows, cols]."""
    return sum(
        float(product(delta[part], H).mul_(delta[part]).sum(dtype=torch.float64))
        for part in row_parts(delta)
    )


def row_parts(matrix: Tensor) -> Iterator[slice]:
    """The rows of a matrix in parts of at most ``PART`` numbers, for what can be done row by row."""
    step = max(1, PART // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), step):
        yield slice(start, min(start + step, len(matrix)))


def is_finite(tensor: Tensor) -> bool:
    """Whether every number is: whether the smallest and the largest are (NaN is both)."""
    if not tensor.numel():
        return True
    lowest, highest = torch.aminmax(tensor)
    return math.isfinite(lowest) and math.isfinite(highest)
