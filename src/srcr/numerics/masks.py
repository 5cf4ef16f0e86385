"""Masks with exact counts; True is kept."""

import re

import torch
from torch import Tensor

from srcr.errors import InputError
from srcr.numerics.kernels.dispatch import kth_smallest

UNSTRUCTURED = "unstructured"
_NM = re.compile(r"([0-9]{1,3}):([0-9]{1,3})")


def parse_structure(structure: str) -> tuple[int, int] | None:
    """``(N, M)`` of "N:M" (N of every M neighbours are kept), None of "unstructured".

    Raises:
        InputError: anything else, or N not in 1..M-1.
    """
    if structure == UNSTRUCTURED:
        return None
    match = _NM.fullmatch(structure)
    if not match:
        raise InputError(
            f"mask structure {structure!r} is not known: use 'unstructured' or 'N:M', for example 2:4"
        )
    kept, group = int(match[1]), int(match[2])
    if not 1 <= kept < group:
        raise InputError(f"mask structure {structure!r}: N must be at least 1 and less than M")
    return kept, group


def check_width(pattern: tuple[int, int] | None, cols: int) -> None:
    """Check that an N:M ``pattern`` fits a width.

    Raises:
        InputError: M does not divide ``cols``.
    """
    if pattern and cols % pattern[1]:
        raise InputError(
            f"{pattern[0]}:{pattern[1]} sparsity needs a width that {pattern[1]} divides, got {cols}"
        )


def count_pruned(sparsity: float, size: int) -> int:
    """How many of ``size`` weights are zero at ``sparsity``: the nearest whole number."""
    return round(sparsity * size)


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
