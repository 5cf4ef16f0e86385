"""How many weights a sparsity or an N:M structure makes zero."""

import re

from srcr.errors import InputError

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


def count_pruned(sparsity: float, size: int) -> int:
    """How many of ``size`` weights are zero at ``sparsity``: the nearest whole number."""
    return round(sparsity * size)
