"""The scales of a grid: searched for the lowest error of the weights, then refitted to chosen codes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from srcr.numerics.grid import (
    CACHED_ELEMENTS,
    COARSE,
    FINE,
    Grid,
    GridSpec,
    QParams,
    code_range,
    round_to_storage,
)
from srcr.numerics.kernels.dispatch import scale_search_for
from srcr.numerics.tensors import row_chunks

#: Error exponent of the scale search: large errors count more than squared (as in GPTQ's own search).
ERROR_NORM = 2.4
#: Ranges tried by the search, as fractions of the largest surviving weight.
SHRINKS = tuple(1.0 - 0.02 * i for i in range(36))

#: Loss [rows, groups], scales, and zero-points or None.
Trial = tuple[Tensor, Tensor, Tensor | None]


def fit_grid(
    W: Tensor,
    spec: GridSpec,
    importance: Tensor | None = None,
    mask: Tensor | None = None,
    shrinks: Sequence[float] = SHRINKS,
) -> Grid:
    """The grid of the surviving weights of ``W`` [rows, cols].

    ``importance`` [cols] weighs the error of each column (the Hessian's diagonal), ``mask`` [rows, cols]
    is True for surviving weights. The range of the weights (round-to-nearest's grid) and that range times
    every third of ``shrinks`` are tried, then those beside the best of them; the lowest ``sum importance *
    |error|^2.4`` of each group wins. Searched by the fastest implementation of the device;
    :func:`search_scales` is the reference.
    """
    search = scale_search_for(W.device) or search_scales
    return search(W, spec, importance, mask, shrinks)


def search_scales(
    W: Tensor,
    spec: GridSpec,
    importance: Tensor | None,
    mask: Tensor | None,
    shrinks: Sequence[float],
) -> Grid:
    """As :func:`fit_grid`, in PyTorch: the reference of the compiled search."""
    grids = [
        _search_chunk(W[rows], spec, importance, None if mask is None else mask[rows], shrinks)
        for rows in row_chunks(W, CACHED_ELEMENTS)
    ]
    zero_points = [grid.zero_point for grid in grids if grid.zero_point is not None]
    return spec.grid(
        torch.cat([grid.scale for grid in grids]),
        torch.cat(zero_points) if zero_points else None,
    )


def _search_chunk(
    W: Tensor,
    spec: GridSpec,
    importance: Tensor | None,
    mask: Tensor | None,
    shrinks: Sequence[float],
) -> Grid:
    """:func:`search_scales` for rows that stay in the cache."""
    rows, cols = W.shape
    grouped = W.reshape(rows, cols // spec.group_size, spec.group_size)
    if mask is not None:
        kept = mask.view_as(grouped)
        # A group without survivors is fitted whole: the sweep may yet choose otherwise.
        kept = kept | ~kept.any(dim=2, keepdim=True)
        grouped = torch.where(kept, grouped, torch.zeros_like(grouped))
    highest = grouped.amax(dim=2).clamp_min(0)
    lowest = grouped.amin(dim=2).clamp_max(0)
    weight = None
    if importance is not None:
        weight = importance.reshape(1, cols // spec.group_size, spec.group_size)
    # The plain range comes first, so that the search never does worse than round-to-nearest.
    best = _tried(grouped, weight, spec, *_candidates(lowest, highest, spec, both_sides=False)[0])
    center = torch.zeros_like(highest, dtype=torch.long)
    for number in range(0, len(shrinks), COARSE):
        shrunk = lowest * shrinks[number], highest * shrinks[number]
        for candidate in _candidates(*shrunk, spec, both_sides=True):
            best, better = _better(best, _tried(grouped, weight, spec, *candidate))
            center = torch.where(better, number, center)
    steps = torch.tensor([*shrinks, 1.0], device=W.device)
    for offset in FINE if shrinks else ():
        beside = center + offset
        inside = (beside >= 0) & (beside < len(shrinks))
        shrink = steps[torch.where(inside, beside, 0)]
        for candidate in _candidates(lowest * shrink, highest * shrink, spec, both_sides=True):
            loss, scale, zero_point = _tried(grouped, weight, spec, *candidate)
            loss = torch.where(inside, loss, torch.inf)
            best, _ = _better(best, (loss, scale, zero_point))
    return spec.grid(best[1], best[2])


def _tried(
    grouped: Tensor, weight: Tensor | None, spec: GridSpec, scale: Tensor, zero_point: Tensor | None
) -> Trial:
    """Scales as they are stored, and what rounding on them costs."""
    scale = round_to_storage(scale, spec.dtype)
    return _loss(grouped, scale, zero_point, spec, weight), scale, zero_point


def _better(best: Trial, other: Trial) -> tuple[Trial, Tensor]:
    """Of each group the better trial, and where that is the ``other``."""
    better = other[0] < best[0]
    zero_point = None
    if best[2] is not None and other[2] is not None:
        zero_point = torch.where(better, other[2], best[2])
    loss, scale = (
        torch.where(better, new, old) for new, old in zip(other[:2], best[:2], strict=True)
    )
    return (loss, scale, zero_point), better


def _loss(
    grouped: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    spec: GridSpec,
    weight: Tensor | None,
) -> Tensor:
    """The weighted error [rows, groups] of rounding ``grouped`` [rows, groups, group_size]."""
    zero_point = None if zero_point is None else zero_point[..., None]
    product = spec.product or spec.dtype
    qparams = QParams(scale[..., None], zero_point, *code_range(spec.num_bits), product)
    error = (qparams.dequantize(qparams.quantize(grouped)) - grouped).abs_().pow_(ERROR_NORM)
    return (error if weight is None else error * weight).sum(dim=2)


def _candidates(
    lowest: Tensor, highest: Tensor, spec: GridSpec, both_sides: bool
) -> list[tuple[Tensor, Tensor | None]]:
    """Scales and zero-points float32 [rows, groups] for a range that includes 0. ``both_sides``: symmetric
    grids with the spare code below zero, and above."""
    quant_min, quant_max = code_range(spec.num_bits)
    if not spec.symmetric:
        scale = (highest - lowest) / (quant_max - quant_min)
        safe = torch.where(scale > 0, scale, torch.ones_like(scale))
        return [(scale, (quant_min - lowest / safe).round_().clamp_(quant_min, quant_max))]
    largest = torch.maximum(highest, -lowest)
    if not both_sides:
        return [(largest / ((quant_max - quant_min) / 2), None)]
    # The grid has one code more below zero: a negative scale gives it to the positive weights.
    return [(largest / -quant_min, None), (largest / quant_min, None)]


def refit_scale(
    scale: Tensor, along: Tensor, energy: Tensor, rounding: Callable[[Tensor], Tensor]
) -> Tensor:
    """The scales [rows] of a group that, with the codes as they are, come nearest to the target in the
    outputs, rounded by ``rounding``; those in ``scale`` where that would not be nearer.

    With the group's codes c (less the zero-point), all else in place, the damped output error changes by
    ``-2 step along + step^2 energy``, where ``along`` is ``(target - Q)(H + damp I) c^T`` and ``energy`` is
    ``c (H + damp I) c^T``.
    """
    step = along / energy.clamp_min(torch.finfo(torch.float32).tiny)
    fitted = rounding(scale + step)
    step = fitted - scale
    # A row of zero codes says nothing of its scale.
    nearer = (energy > 0) & torch.isfinite(fitted) & (step * (step * energy - 2 * along) < 0)
    return torch.where(nearer, fitted, scale)
