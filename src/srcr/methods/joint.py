"""One pruner and one quantizer, put together: in one pass, or in the paper's sequences.

The linears of a unit share an input, so they share the Hessian and its factorisation; those with the
same treatment are stacked by rows and swept together, each with its own exact number of zeros.

Modes (Laborde et al., arXiv 2505.07289, section III):

- ``joint``: one sweep chooses the mask and rounds the rest; what pruning costs is measured against
  what rounding would have cost.
- ``sequential-a``: prune first, then quantize *all* weights of the pruned matrix: the grid is fitted to
  zeros and survivors alike, and what the second sweep pushes onto a pruned weight is pushed on.
- ``sequential-b``: prune first, then quantize the *survivors* only: the grid is fitted to them, and what
  reaches a pruned weight is dropped.

In every mode pruned weights end as exactly 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from srcr import memory
from srcr.errors import InputError
from srcr.methods import Pruner, Quantizer, get_pruner, get_quantizer
from srcr.numerics import hessian, masks, obs
from srcr.numerics.descent import descend
from srcr.numerics.grid import Column, Grid, refit_scales
from srcr.numerics.hessian import row_parts
from srcr.numerics.products import product
from srcr.types import CompressedWeight, LayerPlan, LayerStats, PruneSpec, QuantSpec, SweepSpec

#: By whether columns are swept in activation order, and M of N:M.
Factors = dict[tuple[bool, int], hessian.Factor]
#: Numbers of a linear up to which it is swept together with others: larger ones take memory, not time.
STACKED = 1 << 20


@dataclass(frozen=True, eq=False)
class _Stack:
    """Linears swept together: their ``names``, dense weights one above the other ``W`` [rows, cols], rows
    ``sizes`` and shares of zeros ``sparsities``, and how they are treated."""

    names: tuple[str, ...]
    W: Tensor
    sizes: tuple[int, ...]
    sparsities: tuple[float, ...]
    prune: PruneSpec | None
    quant: QuantSpec | None
    group_size: int
    dtype: torch.dtype

    @property
    def pruner(self) -> Pruner | None:
        return get_pruner(self.prune.method) if self.prune and any(self.sparsities) else None

    @property
    def quantizer(self) -> Quantizer | None:
        return get_quantizer(self.quant.method) if self.quant else None

    @property
    def pattern(self) -> tuple[int, int] | None:
        return masks.parse_structure(self.prune.mask_structure) if self.prune else None

    @property
    def compensates(self) -> bool:
        return any(m is not None and m.compensates for m in (self.pruner, self.quantizer))


def compress_unit(
    weights: dict[str, Tensor],
    stats: LayerStats,
    plans: dict[str, LayerPlan],
    spec: SweepSpec,
    dtype: torch.dtype,
    factors: Factors | None = None,
) -> dict[str, CompressedWeight]:
    """Compress linears that share an input: ``weights`` [rows, cols] float32 and ``plans`` by name.

    ``dtype`` is the checkpoint's: scales and unquantized weights are rounded to it. Linears whose plan
    is empty are left out of the result. ``stats.pulled`` is used up where it is given. ``factors`` of these
    very statistics are taken from there where they are known, and put there where they are not, so that many
    plans cost one factorisation.

    Raises:
        InputError: a group size or N:M pattern does not divide the width, or a method is not known.
        NumericalError: the Hessian cannot be factorised.
    """
    stats = stats.settle(weights)
    result: dict[str, CompressedWeight] = {}
    shared = factors is not None
    factors = {} if factors is None else factors
    stacks = [_stack(names, weights, plans, dtype) for names in _together(weights, plans)]
    targets = _targets(stacks, weights, stats, spec)
    while stacks:  # each goes as soon as it is done
        stack = stacks.pop(0)
        last = not stacks and not shared
        result |= _compress_stack(stack, stats, spec, factors, targets, last)
    return {name: result[name] for name in weights if name in result}


def _targets(
    stacks: Sequence[_Stack], weights: dict[str, Tensor], stats: LayerStats, spec: SweepSpec
) -> dict[str, Tensor]:
    """The dense targets of every linear that is compensated, where the dense model saw some of the tokens
    only: by a factor of their own Hessian, which goes before another is made. Otherwise none."""
    names = [name for stack in stacks if stack.compensates for name in stack.names]
    if not (names and spec.dense_targets and stats.matched is not None):
        return {}
    assert stats.pulled is not None
    factor = hessian.factorize(stats.matched, None, spec.dampening_frac)
    return {
        name: hessian.dense_target(weights[name], stats.pulled.pop(name), factor) for name in names
    }


def _stack(
    names: Sequence[str],
    weights: dict[str, Tensor],
    plans: dict[str, LayerPlan],
    dtype: torch.dtype,
) -> _Stack:
    plan = plans[names[0]]
    return _Stack(
        tuple(names),
        _stacked([weights[name] for name in names]),
        tuple(weights[name].shape[0] for name in names),
        tuple(plans[name].sparsity for name in names),
        plan.prune,
        plan.quant,
        _group_size(plan, weights[names[0]].shape[1]),
        dtype,
    )


def _compress_stack(
    stack: _Stack,
    stats: LayerStats,
    spec: SweepSpec,
    factors: Factors,
    targets: dict[str, Tensor],
    last: bool,
) -> dict[str, CompressedWeight]:
    """:func:`compress_unit` of linears with the same treatment; ``factors`` are shared with others, and go
    as soon as the ``last`` has no more use for them. ``targets`` are used up."""
    ordered = stack.quant is None or stack.quant.actorder == "static"
    key = ordered, stack.pattern[1] if stack.pattern else 1
    if stack.compensates and key not in factors:
        masks.check_width(stack.pattern, stack.W.shape[1])
        order = hessian.activation_order(stats.hessian.diagonal(), key[1]) if ordered else None
        factors[key] = hessian.factorize(stats.hessian, order, spec.dampening_frac)
    factor = factors[key] if stack.compensates else None
    _tidy(stack)
    swept, grid, target, goal = _solve(stack, stats, factor, targets, spec)
    energy = None
    if factor is not None and goal is not None:
        order, damp = factor.order, factor.damp
        del factor
        if last:
            factors.clear()
        _tidy(stack)
        swept, grid, energy = _polish(stack, swept, grid, goal, stats, order, damp, spec)
    _tidy(stack)
    return _split(stack, stats, swept, grid, target, energy if target is goal else None)


def _together(weights: dict[str, Tensor], plans: dict[str, LayerPlan]) -> list[list[str]]:
    """Names with the same treatment (sparsities may differ), as many at a time as gain by it; those with
    none left out."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, W in weights.items():
        prune, quant = plans[name].prune, plans[name].quant
        how = (prune.method, prune.mask_structure) if prune and prune.sparsity > 0 else None
        if quant is not None or how is not None:
            alone = name if W.numel() > STACKED else None
            groups.setdefault((how, quant, alone), []).append(name)
    return list(groups.values())


def _tidy(stack: _Stack) -> None:
    """Between steps on a large linear, give back what the last one took: glibc would keep it, and the
    next step's needs differ. (For every tensor at once it would cost a third of the time.)"""
    if stack.W.numel() > STACKED:
        memory.release()


def _stacked(matrices: Sequence[Tensor]) -> Tensor:
    """Some matrices one above the other; a single one as it is."""
    return matrices[0] if len(matrices) == 1 else torch.cat(list(matrices))


def _group_size(plan: LayerPlan, cols: int) -> int:
    """Columns that share a scale; a group size still "auto" is the whole row."""
    asked = plan.quant.group_size if plan.quant else -1
    size = asked if isinstance(asked, int) and asked != -1 else cols
    if cols % size:
        raise InputError(
            f"group size {size} does not divide the width {cols} of {plan.name}: use a divisor, "
            "-1 (channel-wise) or auto"
        )
    return size


def _solve(
    stack: _Stack,
    stats: LayerStats,
    factor: hessian.Factor | None,
    targets: dict[str, Tensor],
    spec: SweepSpec,
) -> tuple[obs.Swept, Grid | None, Tensor, Tensor | None]:
    """The compressed stack, its grid, the weights it was made to imitate, and those that it is to be
    polished towards (None: it is not)."""
    diagonal = stats.hessian.diagonal()
    if factor is None:
        return *_direct(stack, diagonal), stack.W, None
    target = stack.W
    if targets:
        target = _stacked([targets.pop(name) for name in stack.names])
    elif spec.dense_targets and stats.pulled is not None:
        pulled = _stacked([stats.pulled.pop(name) for name in stack.names])
        target = hessian.dense_target(stack.W, pulled, factor)
        _tidy(stack)
    sequential = spec.mode != "joint" or (
        stack.quantizer is not None and not stack.quantizer.compensates
    )
    if sequential and stack.pruner is not None and stack.quantizer is not None:
        swept, grid, goal = _in_sequence(stack, target, stats, factor, spec)
        return swept, grid, target, goal
    return *_one_pass(stack, target, stats, factor, spec), target, target


def _direct(stack: _Stack, diagonal: Tensor) -> tuple[obs.Swept, Grid | None]:
    """Methods that do not compensate: choose, round, done."""
    keep = None
    if stack.pruner is not None:
        keep = _choose(stack, stack.W, diagonal, torch.ones_like(diagonal), None, slice(0, None))
    return _round(stack, stack.W, diagonal, keep)


def _round(
    stack: _Stack, W: Tensor, diagonal: Tensor, keep: Tensor | None
) -> tuple[obs.Swept, Grid | None]:
    """Every surviving weight to its nearest code on the quantizer's grid."""
    grid = _fit(stack, W, diagonal, keep)
    codes = None
    if grid is not None:
        column = grid.expand()
        codes = column.quantize(W)
        if keep is not None:
            codes = torch.where(keep, codes, column.zero_codes())
        W = column.dequantize(codes)
        codes = codes.to(torch.int8)
    elif keep is not None:
        W = torch.where(keep, W, torch.zeros_like(W))
    return obs.Swept(W, codes, keep, torch.zeros(W.shape[0], device=W.device)), grid


def _one_pass(
    stack: _Stack, target: Tensor, stats: LayerStats, factor: hessian.Factor, spec: SweepSpec
) -> tuple[obs.Swept, Grid | None]:
    """Prune and quantize in the same sweep."""
    diagonal = stats.hessian.diagonal()
    keep = None
    if stack.pruner is not None:  # a first guess of the mask, to fit the grid to what will survive
        keep = _preview(stack, target, factor)
        _tidy(stack)
    grid = _fit(stack, target, diagonal, keep)
    del keep
    _tidy(stack)
    selection = _selection(stack, factor, grid, spec)
    return obs.sweep(target, factor, selection, grid, _block(stack, spec)), grid


def _polish(
    stack: _Stack,
    swept: obs.Swept,
    grid: Grid | None,
    target: Tensor,
    stats: LayerStats,
    order: Tensor,
    damp: float,
    spec: SweepSpec,
) -> tuple[obs.Swept, Grid | None, Tensor | None]:
    """Fit the scales to the codes, then the codes to the scales, as often as the spec says. Rows do not
    depend on each other: some at a time, and put where the sweep's own result was. Last comes the target's
    output energy a row, ``diag(T H T^T)``, where it was needed on the way."""
    if spec.descent_rounds == 0:
        return swept, grid, None
    scales = None if grid is None else grid.scale.clone()
    energy = torch.empty(len(target), device=target.device)
    for part in row_parts(target):
        some, wanted = swept.rows(part), target[part]
        reach = product(wanted, stats.hessian)
        energy[part] = (reach * wanted).sum(dim=1)
        reach.add_(wanted, alpha=damp)
        fitted = None if grid is None else grid.rows(part)
        for _ in range(spec.descent_rounds):
            if fitted is not None and some.codes is not None:
                fitted = refit_scales(fitted, some.codes, wanted, stats.hessian, damp, reach)
            some = descend(some, wanted, stats.hessian, damp, order, fitted, _block(stack, spec))
        swept.weight[part] = some.weight
        if swept.codes is not None and some.codes is not None:
            swept.codes[part] = some.codes
        if scales is not None and fitted is not None:
            scales[part] = fitted.scale
    grid = grid if scales is None or grid is None else replace(grid, scale=scales)
    return swept, grid, energy


def _in_sequence(
    stack: _Stack, target: Tensor, stats: LayerStats, factor: hessian.Factor, spec: SweepSpec
) -> tuple[obs.Swept, Grid | None, Tensor | None]:
    """Prune, then quantize: the paper's Case A and Case B (see the module's text); and what to polish
    towards."""
    diagonal, block = stats.hessian.diagonal(), _block(stack, spec)
    pruned = obs.sweep(target, factor, _selection(stack, factor, None, spec), None, block)
    keep = pruned.keep
    assert keep is not None
    assert stack.quantizer is not None
    if not stack.quantizer.compensates:
        return *_round(stack, pruned.weight, diagonal, keep), None
    survivors = spec.mode == "sequential-b"
    grid = _fit(stack, pruned.weight, diagonal, keep if survivors else None)
    assert grid is not None
    ordered = keep[:, factor.order]
    fixed = obs.Selection(lambda _, at: ordered[:, at], block, push=not survivors)
    swept = obs.sweep(pruned.weight, factor, fixed, grid, block)
    return swept, grid, pruned.weight


def _fit(stack: _Stack, W: Tensor, diagonal: Tensor, keep: Tensor | None) -> Grid | None:
    if stack.quantizer is None or stack.quant is None:
        return None
    return stack.quantizer.fit(W, stack.quant, stack.group_size, stack.dtype, diagonal, keep)


def _block(stack: _Stack, spec: SweepSpec) -> int:
    """The block size, a multiple of M for N:M so that no group is cut."""
    if stack.pattern is None:
        return spec.block_size
    return -(-spec.block_size // stack.pattern[1]) * stack.pattern[1]


def _selection(
    stack: _Stack, factor: hessian.Factor, grid: Grid | None, spec: SweepSpec
) -> obs.Selection | None:
    """How the sweep chooses its mask: block by block, or group by group for N:M. Pruners that do not
    compensate choose once, from the dense weights."""
    if stack.pruner is None:
        return None
    diagonal, pivots = factor.diagonal[factor.order], factor.upper.diagonal()
    block = _block(stack, spec)
    if not stack.pruner.compensates:
        whole = _choose(stack, stack.W[:, factor.order], diagonal, pivots, None, slice(0, None))
        return obs.Selection(lambda _, at: whole[:, at], block)

    def select(W: Tensor, at: slice) -> Tensor:
        W, rounded = W.contiguous(), None
        if grid is not None:
            column: Column = grid.columns(factor.order[at])
            rounded = column.dequantize(column.quantize(W))
        return _choose(stack, W, diagonal[at], pivots[at], rounded, at)

    return obs.Selection(select, stack.pattern[1] if stack.pattern else block)


def _preview(stack: _Stack, target: Tensor, factor: hessian.Factor) -> Tensor:
    """The mask that would be chosen before any weight has moved."""
    pivots = torch.empty_like(factor.diagonal)
    pivots[factor.order] = factor.upper.diagonal()
    source = target if stack.pruner is not None and stack.pruner.compensates else stack.W
    parts = []
    for rows, size, sparsity in zip(
        torch.split(source, list(stack.sizes)), stack.sizes, stack.sparsities, strict=True
    ):  # one linear after the other: their masks do not depend on each other
        one = replace(stack, W=rows, sizes=(size,), sparsities=(sparsity,))
        parts.append(_choose(one, rows, factor.diagonal, pivots, None, slice(0, None)))
    return torch.cat(parts)


def _choose(
    stack: _Stack,
    W: Tensor,
    diagonal: Tensor,
    pivots: Tensor,
    rounded: Tensor | None,
    at: slice,
) -> Tensor:
    """The mask of the columns ``at`` these positions, each linear of the stack on its own count.

    The count of a span is what the whole layer owes up to its end, less what it owes up to its start,
    so that spans add up to exactly ``round(sparsity * size)``.
    """
    assert stack.pruner is not None
    scores = torch.empty_like(W)
    for some in hessian.row_parts(W):
        fixed = None if rounded is None else rounded[some]
        scores[some] = stack.pruner.scores(W[some], diagonal, pivots, fixed)
    if stack.pattern is not None:
        return masks.keep_n_of_m(scores, *stack.pattern)
    start, stop = at.start, at.start + W.shape[1]
    parts = []
    for part, sparsity in zip(
        torch.split(scores, list(stack.sizes)), stack.sparsities, strict=True
    ):
        rows = part.shape[0]
        due = masks.count_pruned(sparsity, rows * stop) - masks.count_pruned(sparsity, rows * start)
        keep = masks.keep_rowwise if stack.pruner.scope == "row" else masks.keep_all_but_lowest
        parts.append(keep(part, due))
    return torch.cat(parts)


def _split(
    stack: _Stack,
    stats: LayerStats,
    swept: obs.Swept,
    grid: Grid | None,
    target: Tensor,
    energy: Tensor | None,
) -> dict[str, CompressedWeight]:
    """Undo the stacking, and measure each linear's output error relative to its output energy (a row; None:
    not known yet)."""
    result = {}
    start = 0
    for name, rows, sparsity in zip(stack.names, stack.sizes, stack.sparsities, strict=True):
        part = slice(start, start + rows)
        start += rows
        values = None if swept.codes is not None else swept.weight[part].to(stack.dtype)
        error = 0.0
        for some in row_parts(target[part]):
            final = swept.weight[part][some] if values is None else values[some].to(torch.float32)
            error += hessian.output_error(final - target[part][some], stats.hessian)
        if energy is None:
            total = hessian.output_error(target[part], stats.hessian)
        else:
            total = float(energy[part].sum(dtype=torch.float64))
        result[name] = CompressedWeight(
            mask=swept.keep[part].clone() if swept.keep is not None and sparsity > 0 else None,
            error=error / total if total > 0 else 0.0,
            codes=None if swept.codes is None else swept.codes[part].clone(),
            grid=None if grid is None else grid.rows(part),
            values=values,
        )
    return result
