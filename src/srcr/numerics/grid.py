"""Uniform integer grids: ``w ~ (code - zero_point) * scale``, one scale for each row or group of columns.

Codes are signed, from ``-2^(b-1)`` to ``2^(b-1) - 1``, as compressed-tensors stores them. Scales are
rounded to the precision they are stored in *before* any code is chosen, and dequantization multiplies
in that precision, because that is what the engine that loads the checkpoint will do.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from srcr.numerics.super_blocks import SUPER_BLOCK
from srcr.numerics.tensors import row_chunks

#: Weights that are dequantized together: they stay in the cache from step to step.
CACHED_ELEMENTS = 1 << 18
#: Of the ranges that a search of scales tries, how far apart the first are, and which beside the best of
#: those are tried next.
COARSE = 3
FINE = (-2, -1, 1, 2)


def code_range(num_bits: int) -> tuple[int, int]:
    """The smallest and the largest code of ``num_bits``."""
    half = 1 << (num_bits - 1)
    return -half, half - 1


def smallest_scale(dtype: torch.dtype) -> float:
    """The smallest positive number of ``dtype``, subnormal ones too, that float32 holds with all its digits:
    quotients by it are exact to float32's precision."""
    info = torch.finfo(dtype)
    return max(info.tiny * info.eps, torch.finfo(torch.float32).tiny)


def round_to_storage(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale`` rounded to ``dtype`` and back to float32; zero and what underflows become the smallest
    scale. Codes are chosen against the rounded scale, so a coarse one costs range, never consistency."""
    rounded = scale.to(dtype).to(torch.float32)
    smallest = smallest_scale(dtype)
    return torch.where(rounded.abs() < smallest, torch.full_like(rounded, smallest), rounded)


def round_product(product: Tensor, dtype: torch.dtype) -> Tensor:
    """What an engine that multiplies codes and scales in ``dtype`` gets, float32, from their product in
    float32: that one is exact (a code has at most 9 bits, a 16-bit scale at most 11), so rounding it is the
    same, and faster where the CPU has no arithmetic in 16 bits. -0.0 becomes 0.0."""
    if dtype != torch.float32:
        product = product.to(dtype).to(torch.float32)
    return product + 0.0


@dataclass(frozen=True)
class GridSpec:
    """The kind of a grid: ``num_bits`` of a code, ``group_size`` columns that share a scale (a divisor of
    the width), ``symmetric`` around 0 or with a zero-point, ``dtype`` of the stored scales, ``product``: the
    precision that the engine multiplies codes and scales in (None: that of the scales). ``scale_bits``:
    scales are whole numbers of so many bits, times a scale of ``dtype`` for each :data:`SUPER_BLOCK`
    columns (None: of ``dtype`` themselves)."""

    num_bits: int
    group_size: int
    symmetric: bool
    dtype: torch.dtype
    product: torch.dtype | None = None
    scale_bits: int | None = None

    def grid(self, scale: Tensor, zero_point: Tensor | None) -> "Grid":
        """The grid of this kind with these scales and zero-points [rows, groups]; scales that are whole
        multiples of another are rounded to such."""
        grid = Grid(scale, zero_point, self.num_bits, self.group_size, self.dtype, self.product)
        if self.scale_bits is None:
            return grid
        per_block = scale.view(len(scale), -1, SUPER_BLOCK // self.group_size)
        largest = per_block.gather(2, per_block.abs().argmax(dim=2, keepdim=True))[..., 0]
        super_scale = round_to_storage(largest / code_range(self.scale_bits)[0], self.dtype)
        grid = replace(grid, super_scale=super_scale, scale_bits=self.scale_bits)
        return replace(grid, scale=grid.rounding()(scale))


@dataclass(frozen=True, eq=False)
class QParams:
    """Quantization parameters as they apply to weights of the same leading shape: ``scale`` and
    ``zero_point`` (None: symmetric) broadcast against them."""

    scale: Tensor
    zero_point: Tensor | None
    quant_min: int
    quant_max: int
    dtype: torch.dtype

    def column(self, index: int) -> "QParams":
        """The parameters [rows] of a column, from those of several [rows, n]."""
        zero_point = None if self.zero_point is None else self.zero_point[:, index]
        return QParams(self.scale[:, index], zero_point, self.quant_min, self.quant_max, self.dtype)

    def quantize(self, weight: Tensor) -> Tensor:
        """The nearest codes, float32 of the shape of ``weight``."""
        codes = weight / self.scale
        if self.zero_point is not None:
            codes = codes + self.zero_point
        return codes.round_().clamp_(self.quant_min, self.quant_max)

    def center(self, codes: Tensor) -> Tensor:
        """Codes less the zero-point: how many steps each weight is away from 0."""
        return codes if self.zero_point is None else codes - self.zero_point

    def dequantize(self, codes: Tensor) -> Tensor:
        """Weights as the engine computes them: the product in ``dtype``, returned as float32."""
        return round_product(self.center(codes) * self.scale, self.dtype)

    def zero_codes(self) -> Tensor:
        """The codes that dequantize to exactly 0."""
        return torch.zeros_like(self.scale) if self.zero_point is None else self.zero_point


@dataclass(frozen=True, eq=False)
class Grid:
    """The grid of a weight [rows, cols]: ``scale`` [rows, groups] float32 holding values of ``dtype``;
    ``zero_point`` [rows, groups] float32 holding codes, or None when symmetric; ``product`` and
    ``scale_bits`` as in :class:`GridSpec`; ``super_scale`` [rows, super-blocks] float32 holding values of
    ``dtype``: what the scales are multiples of (None: of nothing, they have ``dtype`` themselves)."""

    scale: Tensor
    zero_point: Tensor | None
    num_bits: int
    group_size: int
    dtype: torch.dtype
    product: torch.dtype | None = None
    super_scale: Tensor | None = None
    scale_bits: int | None = None

    @property
    def product_dtype(self) -> torch.dtype:
        """The precision that codes and scales are multiplied in."""
        return self.dtype if self.product is None else self.product

    def columns(self, indices: Tensor) -> QParams:
        """The parameters [rows, n] of the columns ``indices`` [n]."""
        groups = indices // self.group_size

        def spread(values: Tensor) -> Tensor:
            return values.expand(-1, len(groups)) if values.shape[1] == 1 else values[:, groups]

        zero_point = None if self.zero_point is None else spread(self.zero_point)
        return QParams(
            spread(self.scale), zero_point, *code_range(self.num_bits), self.product_dtype
        )

    def group(self, index: int) -> QParams:
        """The parameters [rows, 1] of a group."""
        at = slice(index, index + 1)
        zero_point = None if self.zero_point is None else self.zero_point[:, at]
        return QParams(
            self.scale[:, at], zero_point, *code_range(self.num_bits), self.product_dtype
        )

    def expand(self) -> QParams:
        """The parameters [rows, cols] of every weight."""
        cols = self.scale.shape[1] * self.group_size
        return self.columns(torch.arange(cols, device=self.scale.device))

    def dequantize(self, codes: Tensor) -> Tensor:
        """The weights float32 [rows, cols] of ``codes`` as the engine computes them."""
        weight = torch.empty(codes.shape, device=codes.device)
        for rows in row_chunks(codes, CACHED_ELEMENTS):
            grid = self.rows(rows)
            product = grid.steps(codes[rows])
            product.view(len(product), -1, self.group_size).mul_(grid.scale[..., None])
            weight[rows] = round_product(product, self.product_dtype)
        return weight

    def rounding(self, group: int | None = None) -> Callable[[Tensor], Tensor]:
        """What rounds scales [rows, groups], or those [rows] of a ``group``, to what stores them."""
        if self.super_scale is None or self.scale_bits is None:
            return lambda scale: round_to_storage(scale, self.dtype)
        per_block = SUPER_BLOCK // self.group_size
        unit = self._units() if group is None else self.super_scale[:, group // per_block]
        lowest, highest = code_range(self.scale_bits)

        def rounded(scale: Tensor) -> Tensor:
            multiple = (scale / unit).round_().clamp_(lowest, highest)
            # By a scale of 0 nothing can be divided.
            return torch.where(multiple == 0, torch.ones_like(multiple), multiple) * unit

        return rounded

    def in_units(self, super_scale: Tensor, scale_bits: int) -> "Grid":
        """The grid whose scales are those of this one, whole numbers of ``scale_bits``, times
        ``super_scale`` [rows, super-blocks]."""
        grid = replace(self, super_scale=super_scale, scale_bits=scale_bits)
        return replace(grid, scale=self.scale * grid._units())

    def multiples(self) -> Tensor:
        """The scales float32 [rows, groups] in units of those of their super-blocks."""
        return (self.scale / self._units()).round_()

    def _units(self) -> Tensor:
        assert self.super_scale is not None
        return self.super_scale.repeat_interleave(SUPER_BLOCK // self.group_size, dim=1)

    def steps(self, codes: Tensor) -> Tensor:
        """How many steps float32 [rows, cols] each of ``codes`` is away from 0."""
        steps = codes.to(torch.float32, copy=True)
        if self.zero_point is not None:
            steps.view(len(steps), -1, self.group_size).sub_(self.zero_point[..., None])
        return steps

    def rows(self, rows: slice | Tensor) -> "Grid":
        """The grid of some of the rows."""
        return self._mapped(lambda values: values[rows])

    def to(self, device: torch.device | str) -> "Grid":
        """The same grid on another device."""
        return self._mapped(lambda values: values.to(device))

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "Grid":
        zero_point, super_scale = (
            None if values is None else change(values)
            for values in (self.zero_point, self.super_scale)
        )
        return replace(
            self, scale=change(self.scale), zero_point=zero_point, super_scale=super_scale
        )
