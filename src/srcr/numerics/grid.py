"""Uniform integer grids: ``w ~ (code - zero_point) * scale``, one scale a row or a group of columns.

Codes are signed, from ``-2^(b-1)`` to ``2^(b-1) - 1``, as compressed-tensors stores them. Scales are
rounded to the precision they are stored in *before* any code is chosen, and dequantization multiplies
in that precision, because that is what the engine that loads the checkpoint will do.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from srcr.numerics.products import product

if TYPE_CHECKING:
    from srcr.numerics.kernels import FitRows

#: Error exponent of the scale search: large errors count more than squared (as in GPTQ's own search).
ERROR_NORM = 2.4
#: Weights that are worked on together: so many stay in the cache from step to step.
CHUNK = 1 << 18
#: Ranges tried by the search, as fractions of the largest surviving weight.
SHRINKS = tuple(1.0 - 0.02 * i for i in range(36))


def code_range(num_bits: int) -> tuple[int, int]:
    """The smallest and the largest code of ``num_bits``."""
    half = 1 << (num_bits - 1)
    return -half, half - 1


@dataclass(frozen=True, eq=False)
class Grid:
    """``scale`` [rows, groups] float32 holding values of ``dtype``; ``zero_point`` [rows, groups]
    float32 holding codes, or None when symmetric; ``group_size`` columns share a scale."""

    scale: Tensor
    zero_point: Tensor | None
    num_bits: int
    group_size: int
    dtype: torch.dtype

    def columns(self, indices: Tensor) -> "Column":
        """The grid of the weights of several columns [n]: scale and zero-point as [rows, n]."""
        groups = indices // self.group_size

        def spread(values: Tensor) -> Tensor:
            return values.expand(-1, len(groups)) if values.shape[1] == 1 else values[:, groups]

        zero = None if self.zero_point is None else spread(self.zero_point)
        return Column(spread(self.scale), zero, *code_range(self.num_bits), self.dtype)

    def expand(self) -> "Column":
        """The grid of every weight at once: scale and zero-point as [rows, cols]."""
        cols = self.scale.shape[1] * self.group_size
        return self.columns(torch.arange(cols, device=self.scale.device))

    def dequantize(self, codes: Tensor) -> Tensor:
        """Weights of ``codes`` [rows, cols] as the engine computes them (:meth:`Column.dequantize`)."""
        out = torch.empty(codes.shape, device=codes.device)
        for some in _chunks(codes):
            out[some] = self.rows(some).expand().dequantize(codes[some].to(torch.float32))
        return out

    def rows(self, rows: slice) -> "Grid":
        """The grid of some rows."""
        zero = None if self.zero_point is None else self.zero_point[rows]
        return Grid(self.scale[rows], zero, self.num_bits, self.group_size, self.dtype)


@dataclass(frozen=True, eq=False)
class Column:
    """Scale and zero-point as they apply to some weights of the same leading shape."""

    scale: Tensor
    zero_point: Tensor | None
    low: int
    high: int
    dtype: torch.dtype

    def at(self, index: int) -> "Column":
        """Of the grid of several columns [rows, n], that of one."""
        zero = None if self.zero_point is None else self.zero_point[:, index]
        return Column(self.scale[:, index], zero, self.low, self.high, self.dtype)

    def quantize(self, w: Tensor) -> Tensor:
        """The nearest codes (as float32)."""
        codes = w / self.scale
        if self.zero_point is not None:
            codes = codes + self.zero_point
        return codes.round_().clamp_(self.low, self.high)

    def centre(self, codes: Tensor) -> Tensor:
        """Codes less the zero-point: how many steps each weight is away from 0."""
        return codes if self.zero_point is None else codes - self.zero_point

    def dequantize(self, codes: Tensor) -> Tensor:
        """Weights as the engine computes them: the product in ``dtype``, returned as float32."""
        codes = self.centre(codes)
        if self.dtype == torch.float32:
            return codes * self.scale + 0.0  # no -0.0 from a negative scale
        return (codes.to(self.dtype) * self.scale.to(self.dtype)).to(torch.float32) + 0.0

    def zero_codes(self) -> Tensor:
        """The codes that dequantize to exactly 0."""
        return torch.zeros_like(self.scale) if self.zero_point is None else self.zero_point


def stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale`` rounded to ``dtype`` and back; zero and what underflows become the smallest normal."""
    rounded = scale.to(dtype).to(torch.float32)
    tiny = torch.finfo(dtype).tiny
    return torch.where(rounded.abs() < tiny, torch.full_like(rounded, tiny), rounded)


def fit_grid(
    W: Tensor,
    num_bits: int,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype,
    importance: Tensor | None = None,
    keep: Tensor | None = None,
    search: bool = True,
    rows: "FitRows | None" = None,
) -> Grid:
    """Fit scales (and zero-points) to the surviving weights of ``W`` [rows, cols].

    ``importance`` [cols] weighs the error of each column (the Hessian's diagonal), ``keep``
    [rows, cols] marks surviving weights, ``group_size`` divides cols. Without ``search`` the range
    is exactly that of the weights (round-to-nearest's grid); with it, ranges shrunk by ``SHRINKS``
    are tried too and the one with the lowest ``sum importance * |error|^2.4`` is taken. ``rows`` fits
    some rows; None is the fastest that the device has.
    """
    from srcr.numerics.kernels import fit_rows_for

    rows = rows or fit_rows_for(W.device) or fit_rows
    shrinks = SHRINKS if search else ()
    return rows(W, num_bits, group_size, symmetric, dtype, importance, keep, shrinks)


def _chunks(matrix: Tensor) -> Iterator[slice]:
    """The rows of a matrix, about :data:`CHUNK` numbers at a time."""
    step = max(1, CHUNK // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), step):
        yield slice(start, start + step)


def fit_rows(
    W: Tensor,
    num_bits: int,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype,
    importance: Tensor | None,
    keep: Tensor | None,
    shrinks: Sequence[float],
) -> Grid:
    """:func:`fit_grid` with these ranges tried beside the plain one: the reference of the compiled
    search."""
    parts = [
        _fit_chunk(
            W[some], num_bits, group_size, symmetric, dtype, importance,
            None if keep is None else keep[some], shrinks,
        )
        for some in _chunks(W)
    ]  # fmt: skip
    zeros = [part.zero_point for part in parts if part.zero_point is not None]
    return Grid(
        torch.cat([part.scale for part in parts]),
        torch.cat(zeros) if zeros else None,
        num_bits, group_size, dtype,
    )  # fmt: skip


def _fit_chunk(
    W: Tensor,
    num_bits: int,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype,
    importance: Tensor | None,
    keep: Tensor | None,
    shrinks: Sequence[float],
) -> Grid:
    """:func:`fit_rows` of rows that stay in the cache."""
    rows, cols = W.shape
    grouped = W.reshape(rows, cols // group_size, group_size)
    if keep is not None:
        alive = keep.view_as(grouped)
        # A group without survivors is fitted whole: the sweep may yet choose otherwise.
        alive = alive | ~alive.any(dim=2, keepdim=True)
        grouped = torch.where(alive, grouped, torch.zeros_like(grouped))
    highest = grouped.amax(dim=2).clamp_min(0)
    lowest = grouped.amin(dim=2).clamp_max(0)
    weight = None
    if importance is not None:
        weight = importance.reshape(1, cols // group_size, group_size)
    best: tuple[Tensor, Tensor, Tensor | None] | None = None
    # The plain range comes first, so that the search never does worse than round-to-nearest.
    tries = [(1.0, False), *((shrink, True) for shrink in shrinks)]
    for shrink, both in tries:
        for scale, zero in _candidates(
            lowest * shrink, highest * shrink, num_bits, symmetric, both
        ):
            scale = stored(scale, dtype)
            column = Column(
                scale[..., None], None if zero is None else zero[..., None],
                *code_range(num_bits), dtype,
            )  # fmt: skip
            error = (column.dequantize(column.quantize(grouped)) - grouped).abs_().pow_(ERROR_NORM)
            loss = (error if weight is None else error * weight).sum(dim=2)
            if best is None:
                best = loss, scale, zero
                continue
            better = loss < best[0]
            best = (
                torch.where(better, loss, best[0]),
                torch.where(better, scale, best[1]),
                None if zero is None or best[2] is None else torch.where(better, zero, best[2]),
            )
    assert best is not None
    return Grid(best[1], best[2], num_bits, group_size, dtype)


def _candidates(
    lowest: Tensor, highest: Tensor, num_bits: int, symmetric: bool, both: bool
) -> list[tuple[Tensor, Tensor | None]]:
    """Grids for a range that includes 0: (scale, zero-point) as float32 [rows, groups]. ``both``:
    symmetric ones with the spare code on either side."""
    low, high = code_range(num_bits)
    if not symmetric:
        scale = (highest - lowest) / (high - low)
        safe = torch.where(scale > 0, scale, torch.ones_like(scale))
        return [(scale, (low - lowest / safe).round_().clamp_(low, high))]
    largest = torch.maximum(highest, -lowest)
    if not both:
        return [(largest / ((high - low) / 2), None)]
    # The grid has one code more below zero: a negative scale gives it to the positive weights.
    return [(largest / -low, None), (largest / low, None)]


def refit_scales(
    grid: Grid, codes: Tensor, target: Tensor, H: Tensor, damp: float, reach: Tensor | None = None
) -> Grid:
    """The scales that, for these ``codes`` [rows, cols], come nearest to ``target`` in the outputs.

    Minimises ``tr(E (H + damp I) E^T)`` with ``E = target - Q`` over the scale of one group after the
    other (exact for a single group): ``s += (E H) c^T / (c H c^T)`` over the group's codes c. With ``reach``,
    which is ``target (H + damp I)``, a single group needs one product less.
    """
    steps = grid.expand().centre(codes.to(torch.float32))
    error = target - grid.dequantize(codes)
    scale = grid.scale.clone()
    size = grid.group_size
    for group in range(scale.shape[1]):
        part = slice(group * size, (group + 1) * size)
        c = steps[:, part]
        pull = product(error, H[part].T).add_(error[:, part], alpha=damp)
        along = (pull * c).sum(dim=1)
        if reach is not None and scale.shape[1] == 1:  # c H = (target - E) H / s
            energy = ((reach - pull) * c).sum(dim=1) / scale[:, 0]
        else:
            energy = ((product(c, H[part, part]) + damp * c) * c).sum(dim=1)
        step = along / energy.clamp_min(torch.finfo(torch.float32).tiny)
        fitted = stored(scale[:, group] + step, grid.dtype)
        # A row of zero codes says nothing of its scale.
        fitted = torch.where((energy > 0) & torch.isfinite(fitted), fitted, scale[:, group])
        error[:, part] -= (fitted - scale[:, group])[:, None] * c
        scale[:, group] = fitted
    return Grid(scale, grid.zero_point, grid.num_bits, size, grid.dtype)
