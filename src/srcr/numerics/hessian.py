r"""What the second moments of a layer's inputs say about its weight.

For a linear layer ``y = W x`` and inputs ``X`` [n, cols], the squared output error of a change
``dW`` is ``tr(dW H dW^T)`` with the Hessian ``H = X^T X`` (Frantar & Alistarh, SparseGPT,
arXiv 2301.00774, section 3; GPTQ, arXiv 2210.17323, eq. 2).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from srcr.numerics.cholesky import CholeskyFactor
from srcr.numerics.kernels.dispatch import permute_columns
from srcr.numerics.products import product
from srcr.numerics.tensors import row_chunks

#: How far targets go from the dense weights towards those of the regression, which knows the calibration
#: data too well: measured (docs/decisions/009).
TARGET_STEP = 0.8

#: Columns at a time of a product with a triangular matrix.
PANEL = 1024
#: Rows that the output energy of a weight is estimated on, where it has twice as many.
ENERGY_ROWS = 512


@dataclass(eq=False)
class LayerStatistics:
    """Moments of the inputs that linears share. ``hessian`` [cols, cols] = X^T X of the inputs X that the
    compressed model sees. Where the dense model's inputs X_d were measured as well, one of two:
    ``input_cross`` [cols, cols] = X_d^T X; or ``weight_cross``: W X_d^T X [rows, cols] of each linear W by
    name. ``paired_hessian`` [cols, cols]: X^T X of the tokens that the dense model saw too, where those are
    not all (None: all). ``tokens``: how many were routed to the linears (None: they are given every token).

    Not frozen: who solves takes the cross moments out, so that their memory becomes the targets'.
    """

    hessian: Tensor
    weight_cross: dict[str, Tensor] | None = None
    paired_hessian: Tensor | None = None
    input_cross: Tensor | None = None
    tokens: int | None = None

    def take_weight_cross(self, name: str) -> Tensor:
        """The cross moment of a linear, which is not held here any more."""
        assert self.weight_cross is not None
        return self.weight_cross.pop(name)

    def take_input_cross(self) -> Tensor:
        """The cross moment of the inputs, which is not held here any more."""
        assert self.input_cross is not None
        cross, self.input_cross = self.input_cross, None
        return cross


@dataclass(frozen=True, eq=False)
class DampedHessian:
    """``H + damp I``: ``matrix`` H [cols, cols], and the number ``damp``."""

    matrix: Tensor
    damp: float


def activation_order(diagonal: Tensor, multiple: int = 1) -> Tensor:
    """Columns [cols] by falling ``diag(H)``, so that what matters most is rounded while most can repair it.

    With ``multiple`` M > 1, whole groups of M neighbours move together (by their summed diagonal),
    which keeps N:M groups intact.
    """
    groups = diagonal.reshape(-1, multiple).sum(dim=1)
    order = torch.argsort(groups, descending=True, stable=True)
    offsets = torch.arange(multiple, device=diagonal.device)
    return (order[:, None] * multiple + offsets).reshape(-1)


def dense_target_(weight_cross: Tensor, W: Tensor, factor: CholeskyFactor) -> Tensor:
    r"""The weights [rows, cols] that best reproduce the dense model's outputs from the compressed model's
    inputs, in the memory of ``weight_cross``.

    ``|X W'^T - X_d W^T|^2 + damp |W' - W|^2`` with X the inputs the compressed model sees and X_d those of
    the dense model is least at ``W' = (W X_d^T X + damp W)(X^T X + damp I)^-1`` (the closed form behind
    GPTAQ, arXiv 2504.02692); returned is ``W + TARGET_STEP (W' - W)``. ``weight_cross`` [rows, cols] is
    ``W X_d^T X``; ``factor`` is that of ``X^T X`` of the same tokens.
    """
    weight_cross.add_(W, alpha=factor.damp)
    return _times_inverse_(weight_cross, factor).lerp_(W, 1 - TARGET_STEP)


def dense_map_(input_cross: Tensor, factor: CholeskyFactor) -> Tensor:
    """What any weight W is multiplied by to give its :func:`dense_target_`, [cols, cols], in the memory of
    ``input_cross``, which is ``X_d^T X``: the target is linear in W."""
    input_cross.diagonal().add_(factor.damp)
    step = _times_inverse_(input_cross, factor).mul_(TARGET_STEP)
    step.diagonal().add_(1 - TARGET_STEP)
    return step


def _times_inverse_(matrix: Tensor, factor: CholeskyFactor) -> Tensor:
    """``matrix`` [rows, cols] times the inverse of the damped Hessian, in place, by halves of products: the
    factor is triangular."""
    upper, order = factor.upper, factor.order
    starts = range(0, len(order), PANEL)
    for rows in row_chunks(matrix):
        right = matrix[rows][:, order]
        for start in starts:
            panel = slice(start, start + PANEL)
            right[:, panel] = right[:, start:] @ upper[panel, start:].T
        for start in reversed(starts):
            stop = start + PANEL
            right[:, start:stop] = right[:, :stop] @ upper[:stop, start:stop]
        matrix[rows] = right
    return permute_columns(matrix, torch.argsort(order))


def output_error(W: Tensor, H: Tensor, final: Tensor | None = None) -> float:
    """``tr(D H D^T)``, the squared output error of weights ``final`` in place of ``W`` [rows, cols], with
    their difference D; without ``final`` the output energy of ``W``."""
    error = 0.0
    for rows in row_chunks(W):
        delta = W[rows] if final is None else W[rows] - final[rows].to(torch.float32)
        error += float(product(delta, H).mul_(delta).sum(dtype=torch.float64))
    return error


def output_energy(W: Tensor, H: Tensor) -> float:
    """``tr(W H W^T)``, estimated on every so many rows of a large ``W`` [rows, cols]: at least
    :data:`ENERGY_ROWS` of them."""
    step = max(1, len(W) // ENERGY_ROWS)
    rows = W[::step]
    return output_error(rows, H) * len(W) / len(rows)
