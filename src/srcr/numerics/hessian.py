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


@dataclass(eq=False)
class LayerStatistics:
    """Moments of the inputs that linears share. ``hessian`` [cols, cols] = X^T X of the inputs X that the
    compressed model sees. ``weight_cross``: W X_d^T X [rows, cols] of each linear W by name, with the dense
    model's inputs X_d (None: not measured). ``paired_hessian`` [cols, cols]: X^T X of the tokens that the
    dense model saw too, where those are not all (None: all).

    Not frozen: who solves takes each cross moment out, so that its memory becomes the target's.
    """

    hessian: Tensor
    weight_cross: dict[str, Tensor] | None = None
    paired_hessian: Tensor | None = None

    def take_weight_cross(self, name: str) -> Tensor:
        """The cross moment of a linear, which is not held here any more."""
        assert self.weight_cross is not None
        return self.weight_cross.pop(name)


@dataclass(frozen=True, eq=False)
class DampedHessian:
    """``H + damp I``: ``matrix`` H [cols, cols], the number ``damp``, and the ``order`` [cols] in which
    columns are worked on."""

    matrix: Tensor
    damp: float
    order: Tensor


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
    upper, order = factor.upper, factor.order
    for rows in row_chunks(W):
        right = weight_cross[rows].add(W[rows], alpha=factor.damp)[:, order]
        weight_cross[rows] = product(product(right, upper.T), upper)
    return permute_columns(weight_cross, torch.argsort(order)).lerp_(W, 1 - TARGET_STEP)


def output_error(delta: Tensor, H: Tensor) -> float:
    """``tr(delta H delta^T)``: the squared output error of a weight change ``delta`` [rows, cols]."""
    return sum(
        float(product(delta[rows], H).mul_(delta[rows]).sum(dtype=torch.float64))
        for rows in row_chunks(delta)
    )
