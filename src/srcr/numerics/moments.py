"""Sums of products over tokens, ``X^T Y``, always in float32."""

import torch
from torch import Tensor

from srcr.numerics.kernels.dispatch import moments_for
from srcr.numerics.tensors import lower_panels

#: How many times the median token's energy a token may weigh (docs/decisions/012).
MOST_ENERGY = 100.0


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
    for rows, columns in lower_panels(len(moment)):
        accumulate(moment[rows, columns], x[:, rows], x[:, columns])


def token_scales(x: Tensor) -> Tensor | None:
    """What the rows of ``x`` [tokens, width] are multiplied by before they are summed, [tokens, 1], so that
    none has much more than :data:`MOST_ENERGY` times the median's energy; None where none has.

    Some models give the first token activations thousands of times as large as all others (Sun et al.,
    Massive Activations, arXiv 2402.17762): their rounding alone would outweigh what other tokens say.
    Powers of two, which leave the digits of 16-bit numbers alone.
    """
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    most = MOST_ENERGY**0.5 * norms.median()
    if not bool(((norms > most) & (most > 0)).any()):
        return None
    return torch.exp2(torch.log2((most / norms).clamp_max(1)).round()).to(x.dtype)


def mirror_(moment: Tensor) -> None:
    """Copy what stands below the diagonal of ``moment`` [cols, cols] above it, in place."""
    for _, panel in lower_panels(len(moment)):
        corner = moment[panel, panel]
        corner.copy_(corner.tril() + corner.tril(-1).T)
        moment[panel, panel.stop :] = moment[panel.stop :, panel].T
