r"""Refitted scales and cyclic coordinate descent on the codes that a sweep has chosen.

The sweep fixes a column for good when it passes. Afterwards every weight can be looked at again with
all others in place: with ``R = (target - Q)(H + damp I)`` the best value of weight j of a row is
``q_j + R_j / (H_jj + damp)``, and on a grid the code nearest to it (Behdin et al., QuantEase,
arXiv 2309.01885, eq. 6). No step can raise the damped output error (but for the rounding of the engine's
16-bit product), so no round can. Pruned weights stay at zero, but where they are swapped for others
(:mod:`srcr.numerics.swaps`).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from srcr.numerics.grid import Grid
from srcr.numerics.hessian import DampedHessian
from srcr.numerics.kernels.dispatch import StepColumns, kernels_for
from srcr.numerics.kernels.states import DescentState
from srcr.numerics.obs import SweepResult, fix
from srcr.numerics.products import product
from srcr.numerics.scales import refit_scale
from srcr.numerics.swaps import swap_weights


@dataclass(frozen=True)
class Descent:
    """How often all columns are gone through (``rounds``), ``block_size`` at a time; before each round but
    the first up to ``swaps`` weights of a row change places with pruned ones."""

    rounds: int = 1
    block_size: int = 128
    swaps: int = 0


@dataclass(frozen=True, eq=False)
class Refinement:
    """``weights`` on ``grid`` (None: not on any), and ``pull`` [rows, cols], which is
    ``(target - weight)(H + damp I)``."""

    weights: SweepResult
    grid: Grid | None
    pull: Tensor


def step_columns(state: DescentState, start: int, stop: int) -> None:
    """Move the columns ``start:stop`` to their best values, in their order: the reference of the compiled
    kernels."""
    columns = torch.arange(start, stop, device=state.weight.device)
    qparams = None if state.grid is None else state.grid.columns(columns)
    for j in range(start, stop):
        i = j - start
        mask = None if state.mask is None else state.mask[:, j]
        value = state.weight[:, j] + state.pull[:, i] / state.damped[i, i]
        value, codes = fix(value, None if qparams is None else qparams.column(i), mask)
        if state.codes is not None and codes is not None:
            state.codes[:, j] = codes
        step = value - state.weight[:, j]
        state.weight[:, j] = value
        state.pull[:, i + 1 :].addr_(step, state.damped[i, i + 1 :], alpha=-1)


def refine(
    start_from: SweepResult,
    target: Tensor,
    damped: DampedHessian,
    grid: Grid | None = None,
    descent: Descent = Descent(),
    step_block: StepColumns | None = None,
) -> Refinement:
    """What ``start_from`` becomes by a ``descent`` over all columns, towards ``target`` [rows, cols].

    With a grid, on which its weights are, a round refits the scale of each group to its codes before it
    moves the group's columns, and weights stay on it; without one the surviving weights move freely. What
    changes within a block of columns reaches the rest in one product. ``step_block`` moves columns; None is
    the fastest that the device has.
    """
    if step_block is None:
        kernels = kernels_for(target.device)
        step_block = kernels.step_columns if kernels else step_columns
    weight = start_from.weight.clone()
    codes = None if start_from.codes is None else start_from.codes.clone()
    mask = start_from.mask
    if mask is not None and descent.swaps:
        mask = mask.clone()
    if grid is not None:
        grid = replace(grid, scale=grid.scale.clone())
    delta = target - weight
    pull = product(delta, damped.matrix).add_(delta, alpha=damped.damp)
    del delta
    state = DescentState(pull, damped.matrix, weight, codes, mask, grid)
    cols = target.shape[1]
    whole_rows = grid is not None and grid.group_size == cols > descent.block_size
    reach = None
    if whole_rows:
        reach = product(target, damped.matrix).add_(target, alpha=damped.damp)
    for number in range(descent.rounds):
        if number and mask is not None and descent.swaps:
            swap_weights(state, damped.damp, descent.swaps)
        if reach is not None:
            _refit_rows(state, damped, reach)
        for columns in _blocks(cols, descent.block_size, grid):
            _refine_block(state, damped, columns, step_block, refit=not whole_rows)
    return Refinement(SweepResult(weight, codes, mask), grid, pull)


def _blocks(cols: int, block_size: int, grid: Grid | None) -> list[slice]:
    """Blocks of about ``block_size`` columns that cut no group, but where a group is the whole row."""
    size = block_size
    if grid is not None and grid.group_size < cols:
        size = max(1, block_size // grid.group_size) * grid.group_size
    return [slice(start, min(start + size, cols)) for start in range(0, cols, size)]


def _refit_rows(state: DescentState, damped: DampedHessian, reach: Tensor) -> None:
    """Refit the scales of whole rows; ``reach`` is ``target (H + damp I)``, which saves a product."""
    grid, codes = state.grid, state.codes
    assert grid is not None
    assert codes is not None
    steps = grid.steps(codes)
    # c (H + damp I) = (reach - pull) / scale, but for the rounding of the engine's product
    energy = ((reach - state.pull) * steps).sum(dim=1) / grid.scale[:, 0]
    grid.scale[:, 0] = refit_scale(
        grid.scale[:, 0], (state.pull * steps).sum(dim=1), energy, grid.rounding(0)
    )
    moved = grid.dequantize(codes).sub_(state.weight)
    state.weight.add_(moved)
    state.pull.sub_(product(moved, damped.matrix)).sub_(moved, alpha=damped.damp)


def _refine_block(
    state: DescentState,
    damped: DampedHessian,
    columns: slice,
    step_block: StepColumns,
    refit: bool,
) -> None:
    """Refit the scales of a block's groups where ``refit``, each before its columns move; then push what has
    changed on to all columns."""
    first, stop = columns.start, columns.stop
    own = damped.matrix[columns, columns].clone()
    own.diagonal().add_(damped.damp)
    before = state.weight[:, columns].clone()
    pull = state.pull[:, columns].clone()  # what this block still sees while it changes
    size = state.grid.group_size if state.grid is not None and refit else stop - first
    for start in range(first, stop, size):
        span = slice(start, min(start + size, stop))
        inside = slice(span.start - first, span.stop - first)
        part = replace(
            state, pull=pull[:, inside].contiguous(), damped=own[inside, inside].contiguous()
        )
        moved = _refine_span(part, span, step_block, refit)
        pull[:, inside.stop :].addmm_(moved, own[inside, inside.stop :], alpha=-1)
    moved = state.weight[:, columns] - before
    state.pull[:, columns].sub_(moved, alpha=damped.damp)
    state.pull.addmm_(moved, damped.matrix[columns], alpha=-1)


def _refine_span(state: DescentState, span: slice, step_block: StepColumns, refit: bool) -> Tensor:
    """Refit the scale of the group that is the columns ``span``, where ``refit``, and move them; how far
    their weights [rows, n] have come. ``state`` has the pull and the Hessian of these columns."""
    before = state.weight[:, span].clone()
    if state.grid is not None and refit:
        _refit_group(state, state.grid, span)
        state.pull.addmm_(state.weight[:, span] - before, state.damped, alpha=-1)
    step_block(state, span.start, span.stop)
    return state.weight[:, span] - before


def _refit_group(state: DescentState, grid: Grid, span: slice) -> None:
    """Refit the scale of the group that is the columns ``span``, and put its weights on it."""
    assert state.codes is not None
    number = span.start // grid.group_size
    codes = state.codes[:, span].to(torch.float32)
    steps = grid.group(number).center(codes)
    along, energy = (
        (reached * steps).sum(dim=1) for reached in (state.pull, product(steps, state.damped))
    )
    grid.scale[:, number] = refit_scale(grid.scale[:, number], along, energy, grid.rounding(number))
    state.weight[:, span] = grid.group(number).dequantize(codes)
