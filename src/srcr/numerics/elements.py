r"""Which groups of a linear layer's inputs can go, and what those that are left make up for.

Optimal Brain Surgeon on whole groups (Hassibi & Stork 1993; for LLMs ZipLM, arXiv 2302.04089, and SlimGPT,
arXiv 2412.18110; swaps: OSSCAR, arXiv 2403.12983). For weights ``W`` [cols, rows] that are the best there are
for ``tr((W - W*)^T H (W - W*))``, removing the inputs of group g costs ``1/2 tr(W_g^T (H^-1)_gg^-1 W_g)``.
Adding a group of those that are gone gains the same, with the Schur complement of H in place of H^-1 and
the gradient in place of W: one tableau holds both, and exchanging a group is a principal pivot of it.
"""

import math

import torch
from torch import Tensor

from srcr.errors import NumericalError

#: Removal goes by so many steps; after each, what the others cost is known exactly.
STEPS = 16
#: Exchanges of some groups for better ones that are tried at most.
SWAPS = 24


class _Tableau:
    """``A`` [cols, cols] and ``B`` [cols, rows], float64, of a quadratic problem with its inputs partly
    gone: on those that are left the inverse Hessian and the weights, on the others the Schur complement and
    the gradient. ``size`` neighbouring columns are a group."""

    def __init__(self, inverse: Tensor, W: Tensor, size: int) -> None:
        self.A, self.B, self.size = inverse, W, size
        self.left = torch.ones(len(W) // size, dtype=torch.bool, device=W.device)

    def columns(self, groups: Tensor) -> Tensor:
        """The columns [n] of some groups."""
        offsets = torch.arange(self.size, device=groups.device)
        return (groups[:, None] * self.size + offsets).reshape(-1)

    def worth(self) -> Tensor:
        """What the objective changes by where each group [groups] goes, or comes back."""
        if self.size == 1:
            return self.B.square().sum(1).div_(self.A.diagonal()).mul_(0.5)
        corners = self._blocks()
        B = self.B.reshape(len(corners), self.size, -1)
        solved: Tensor = torch.linalg.solve(corners, B)
        return (B * solved).sum((1, 2)).mul_(0.5)

    def exchange(self, groups: Tensor) -> float:
        """Pivot: groups that are left go, others come back. Returns how the objective changes."""
        columns = self.columns(groups)
        P = torch.linalg.inv(self.A[columns][:, columns])
        rows, right = self.A[columns], self.B[columns]
        solved, weights = P @ rows, P @ right
        left = bool(self.left[groups[0]])
        change = 0.5 * float((right * weights).sum())
        column = self.A[:, columns]
        self.A.addmm_(column, solved, alpha=-1)
        self.B.addmm_(column, weights, alpha=-1)
        self.A[columns] = -solved
        self.B[columns] = -weights
        self.A[:, columns] = column @ P
        self.A[columns.unsqueeze(1), columns] = P
        self.left[groups] = not left
        return change if left else -change

    def _blocks(self) -> Tensor:
        """The diagonal blocks [groups, size, size] of ``A``."""
        n, size = len(self.left), self.size
        return self.A.view(n, size, n, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def damped(H: Tensor, dampening_frac: float) -> Tensor:
    """``H`` [cols, cols] in float64 with a fraction of its mean diagonal added to it."""
    H = H.to(torch.float64, copy=True)
    mean = float(H.diagonal().mean())
    H.diagonal().add_(dampening_frac * mean if mean > 0 else 1.0)
    return H


def choose_elements(W: Tensor, H: Tensor, size: int, count: int) -> Tensor:
    """The ``count`` groups of ``size`` columns of ``W`` [rows, cols] that can go at the least cost, [count]
    int64, ascending, where those that are left make up for them. ``H`` [cols, cols] float64 is the damped
    Hessian.

    The cheapest go in :data:`STEPS` steps; then some are exchanged for better ones, as long as the
    objective falls.

    Raises:
        NumericalError: ``H`` is not positive definite.
    """
    factor, info = torch.linalg.cholesky_ex(H)
    if int(info):
        raise NumericalError("the Hessian is not positive definite: use more calibration data")
    inverse = torch.cholesky_inverse(factor)
    del factor  # as large as what follows
    tableau = _Tableau(inverse, W.T.to(torch.float64, copy=True), size)
    step = max(1, math.ceil(count / STEPS))
    gone = 0
    while gone < count:
        cost = tableau.worth().masked_fill(~tableau.left, math.inf)
        cheapest = torch.argsort(cost, stable=True)[: min(step, count - gone)]
        tableau.exchange(cheapest)
        gone += len(cheapest)
    _swap(tableau, count, step)
    return (~tableau.left).nonzero().view(-1)


def _swap(tableau: _Tableau, count: int, most: int) -> None:
    """Exchange groups, at most so many at a time, while the objective falls."""
    if not 0 < count < len(tableau.left):
        return
    tries, number = 0, min(most, count)
    while number >= 1 and tries < SWAPS:
        tries += 1
        gain = tableau.worth().masked_fill(tableau.left, -math.inf)
        back = torch.argsort(gain, descending=True, stable=True)[:number]
        change = tableau.exchange(back)
        cost = tableau.worth().masked_fill(~tableau.left, math.inf)
        out = torch.argsort(cost, stable=True)[:number]
        change += tableau.exchange(out)
        if not change < 0 or torch.equal(back.sort().values, out.sort().values):
            tableau.exchange(out)
            tableau.exchange(back)
            number //= 2


def refit(W: Tensor, H: Tensor, gone: Tensor) -> Tensor:
    """The weights [rows, cols - gone] float64 that the columns of ``W`` [rows, cols] which are left have when
    they make up for the columns ``gone`` [n]: ``W_K + W_R H_RK H_KK^-1``, least in
    ``tr((W' - W) H (W' - W)^T)``. ``H`` [cols, cols] float64 is the damped Hessian.

    Raises:
        NumericalError: ``H`` is not positive definite.
    """
    left = torch.ones(len(H), dtype=torch.bool, device=H.device)
    left[gone] = False
    factor, info = torch.linalg.cholesky_ex(H[left][:, left])
    if int(info):
        raise NumericalError("the Hessian is not positive definite: use more calibration data")
    W = W.to(torch.float64)
    moved = torch.cholesky_solve(H[left][:, gone] @ W[:, gone].T, factor)
    return W[:, left] + moved.T
