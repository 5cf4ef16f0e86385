"""Masks with exact counts; True is kept."""

import torch
from torch import Tensor

from srcr.errors import InputError
from srcr.numerics.kernels.dispatch import kth_smallest


def check_width(pattern: tuple[int, int] | None, cols: int) -> None:
    """Check that an N:M ``pattern`` fits a width.

    Raises:
        InputError: M does not divide ``cols``.
    """
    if pattern and cols % pattern[1]:
        raise InputError(
            f"{pattern[0]}:{pattern[1]} sparsity needs a width that {pattern[1]} divides, got {cols}"
        )


def prune_lowest(scores: Tensor, count: int) -> Tensor:
    """The mask that prunes exactly ``count`` entries with the lowest scores of the whole tensor; of equal
    scores the first go."""
    flat = scores.reshape(-1)
    if count <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    limit = kth_smallest(flat, count - 1)
    mask = flat > limit
    pruned = flat.numel() - int(mask.count_nonzero())
    if pruned > count:  # ties, of which only the first go: mostly few
        tied = (flat == limit).nonzero().view(-1)
        mask[tied[count - (pruned - len(tied)) :]] = True
    return mask.view(scores.shape)


def prune_rowwise(scores: Tensor, count: int) -> Tensor:
    """The mask that prunes the lowest of ``scores`` [rows, cols] row by row, ``count`` in all.

    Where the share of a row is not whole, the first rows prune one weight more than the last.
    """
    base, extra = divmod(count, scores.shape[0])
    ranks = torch.argsort(torch.argsort(scores, dim=1, stable=True), dim=1, stable=True)
    quota = torch.full((scores.shape[0], 1), base, device=scores.device)
    quota[:extra] += 1
    return ranks >= quota


def n_of_m_mask(scores: Tensor, kept: int, group: int) -> Tensor:
    """The mask that keeps the ``kept`` highest of every ``group`` neighbouring columns of ``scores``
    [rows, cols].

    Raises:
        InputError: ``group`` does not divide the number of columns.
    """
    rows, cols = scores.shape
    check_width((kept, group), cols)
    grouped = scores.reshape(rows, cols // group, group)
    order = torch.argsort(grouped, dim=2, stable=True)
    mask = torch.ones_like(grouped, dtype=torch.bool)
    mask.scatter_(2, order[:, :, : group - kept], False)
    return mask.view(rows, cols)
