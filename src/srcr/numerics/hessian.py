r"""Second moments of a layer's inputs, and the factor of their inverse that the sweep walks along.

For a linear layer ``y = W x`` and inputs ``X`` [n, cols], the squared output error of a change
``dW`` is ``tr(dW H dW^T)`` with the Hessian ``H = X^T X`` (Frantar & Alistarh, SparseGPT,
arXiv 2301.00774, section 3; GPTQ, arXiv 2210.17323, eq. 2).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from srcr.errors import NumericalError

MAX_DAMPENING = 1.0


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
    """Add ``left^T right`` to ``moment`` [cols, cols] in place; both inputs are [n, cols]."""
    moment.addmm_(left.T, right)


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
    factorisation succeeds (first in float32, then in float64).

    Raises:
        NumericalError: ``H`` is not finite, or not positive definite even with damping equal to the
            mean diagonal.
    """
    diagonal = H.diagonal().clone()
    if not bool(torch.isfinite(H).all()):
        raise NumericalError("the Hessian is not finite (NaN or infinite activations)")
    if order is None:
        order = torch.arange(H.shape[0], device=H.device)
    mean = float(diagonal.mean())
    if mean <= 0:  # no input ever reached this layer: every direction costs the same
        mean, H = 1.0, torch.zeros_like(H)
    backwards = order.flip(0)
    flipped = H[backwards][:, backwards]
    frac = dampening_frac
    while True:
        for dtype in (torch.float32, torch.float64):
            damped = flipped.to(dtype, copy=True)
            damped.diagonal().add_(frac * mean)
            lower, info = torch.linalg.cholesky_ex(damped)
            if int(info) == 0:
                eye = torch.eye(len(order), dtype=dtype, device=H.device)
                inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
                if bool(torch.isfinite(inverse).all()):
                    upper = inverse.flip(0, 1).to(torch.float32).contiguous()
                    return Factor(upper, order, diagonal, frac * mean, frac)
        if frac >= MAX_DAMPENING:
            break
        frac = min(max(frac * 10, 1e-6), MAX_DAMPENING)
    raise NumericalError(
        f"the Hessian could not be factorised even with dampening_frac {MAX_DAMPENING}; "
        "use more or more varied calibration data"
    )


def dense_target(W: Tensor, cross: Tensor, factor: Factor) -> Tensor:
    r"""The weights that best reproduce the dense model's outputs from the compressed model's inputs.

    Minimises ``|X W'^T - X_d W^T|^2 + damp |W' - W|^2`` with X the inputs the compressed model sees
    and X_d those of the dense one: ``W' = W (X_d^T X + damp I)(X^T X + damp I)^-1`` (the closed form
    behind GPTAQ, arXiv 2504.02692). ``W`` is [rows, cols], ``cross = X_d^T X`` [cols, cols].
    """
    upper, order = factor.upper, factor.order
    moved = cross.clone()
    moved.diagonal().add_(factor.damp)
    right = (W @ moved)[:, order]
    solved = (right @ upper.T) @ upper
    out = torch.empty_like(solved)
    out[:, order] = solved
    return out


def output_error(delta: Tensor, H: Tensor) -> float:
    """``tr(delta H delta^T)``: the squared output error of a weight change ``delta`` [rows, cols]."""
    return float(((delta @ H) * delta).sum(dtype=torch.float64))
