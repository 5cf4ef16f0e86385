"""What is solved together: linears that share an input, stacked by rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from srcr.environment import release_memory
from srcr.errors import InputError
from srcr.methods import Pruner, Quantizer, get_pruner, get_quantizer
from srcr.numerics.cholesky import CholeskyFactor
from srcr.numerics.grid import Grid, GridSpec
from srcr.numerics.hessian import LayerStatistics
from srcr.numerics.obs import SweepResult
from srcr.numerics.sparsity import parse_structure
from srcr.plans.plan import LayerPlan
from srcr.plans.specs import PruneSpec, QuantSpec, SolverSpec

#: Factors of the same Hessian, by whether columns are swept in activation order, and M of N:M.
Factors = dict[tuple[bool, int], CholeskyFactor]
#: Numbers of a linear up to which it is swept together with others: larger ones take memory, not time.
STACKED_ELEMENTS = 1 << 20

#: At most so many of a row's weights change places with pruned ones.
SWAPS = 0.1


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """Linears that share an input: ``weights`` [rows, cols] float32 and ``plans`` by name, the
    ``statistics`` of their input (a solver takes the cross moments out of them), and how they are solved.
    ``dtype`` is the checkpoint's: unquantized weights are rounded to it, and scales where their plan says
    nothing else."""

    weights: Mapping[str, Tensor]
    plans: Mapping[str, LayerPlan]
    statistics: LayerStatistics
    spec: SolverSpec
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Solution:
    """``weights``: the compressed stack; ``grid`` its codes are on; ``target`` [rows, cols]: the weights it
    was made to imitate; ``refined_target``: those that it can be polished towards (None: it cannot)."""

    weights: SweepResult
    grid: Grid | None
    target: Tensor
    refined_target: Tensor | None = None


@dataclass(frozen=True, eq=False)
class RowStack:
    """Linears swept together: their ``names``, dense weights below each other ``W`` [rows, cols], rows
    ``sizes`` and shares of zeros ``sparsities``, and how they are pruned and quantized (their sparsities
    apart, all the same way)."""

    names: tuple[str, ...]
    W: Tensor
    sizes: tuple[int, ...]
    sparsities: tuple[float, ...]
    prune: PruneSpec | None
    quant: QuantSpec | None
    grid_spec: GridSpec | None
    dtype: torch.dtype

    @property
    def pruner(self) -> Pruner | None:
        """What chooses the zeros."""
        return get_pruner(self.prune.method) if self.prune and any(self.sparsities) else None

    @property
    def quantizer(self) -> Quantizer | None:
        """What fits the grid."""
        return get_quantizer(self.quant.method) if self.quant else None

    @property
    def swaps(self) -> int:
        """How many weights of a row may change places with pruned ones afterwards: none of a pattern, and
        none where the mask is the choice of a method that does not compensate."""
        pruner = self.pruner
        if pruner is None or not pruner.compensates or self.pattern is not None:
            return 0
        return round(SWAPS * self.W.shape[1])

    @property
    def pattern(self) -> tuple[int, int] | None:
        """(N, M) of an N:M mask."""
        return parse_structure(self.prune.mask_structure) if self.prune else None

    @property
    def compensates(self) -> bool:
        """Whether weights make up for the errors of others, which needs a factor of the Hessian."""
        return any(m is not None and m.compensates for m in (self.pruner, self.quantizer))

    @property
    def factor_key(self) -> tuple[bool, int]:
        """Which of the :data:`Factors` the stack is swept by."""
        ordered = self.quant is None or self.quant.actorder == "static"
        return ordered, self.pattern[1] if self.pattern else 1

    def block_columns(self, spec: SolverSpec) -> int:
        """Columns of a block of the sweep: a multiple of M for N:M, so that no group is cut."""
        if self.pattern is None:
            return spec.block_size
        return -(-spec.block_size // self.pattern[1]) * self.pattern[1]

    def fit_grid(self, W: Tensor, diagonal: Tensor, mask: Tensor | None) -> Grid | None:
        """The quantizer's grid for ``W`` [rows, cols] under the mask; None where nothing is quantized."""
        if self.quantizer is None or self.grid_spec is None:
            return None
        return self.quantizer.fit(W, self.grid_spec, diagonal, mask)

    def release(self) -> None:
        """Between steps on a large stack, give back what the last step took: glibc would keep it, and the
        next step's needs differ. (For every tensor it would cost a third of the time.)"""
        if self.W.numel() > STACKED_ELEMENTS:
            release_memory()


def stack_linears(problem: LayerProblem) -> list[RowStack]:
    """The linears of a problem in stacks, as many at a time as gain by it; those that are left alone in
    none.

    Raises:
        InputError: a group size does not divide the width.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, W in problem.weights.items():
        prune, quant = problem.plans[name].prune, problem.plans[name].quant
        how = (prune.method, prune.mask_structure) if prune and prune.sparsity > 0 else None
        if quant is not None or how is not None:
            alone = name if W.numel() > STACKED_ELEMENTS else None
            groups.setdefault((how, quant, alone), []).append(name)
    return [_stack(names, problem) for names in groups.values()]


def stack_rows(matrices: Sequence[Tensor]) -> Tensor:
    """Matrices below each other; a single one as it is."""
    return matrices[0] if len(matrices) == 1 else torch.cat(list(matrices))


def _stack(names: Sequence[str], problem: LayerProblem) -> RowStack:
    plan = problem.plans[names[0]]
    W = stack_rows([problem.weights[name] for name in names])
    size = _group_size(plan, W.shape[1])
    grid_spec = None
    if plan.quant is not None:
        precision = plan.quant.scale_precision(problem.dtype)
        grid_spec = GridSpec(
            plan.quant.num_bits, size, plan.quant.symmetric, *precision, plan.quant.scale_bits
        )
    return RowStack(
        tuple(names), W,
        tuple(problem.weights[name].shape[0] for name in names),
        tuple(problem.plans[name].sparsity for name in names),
        plan.prune, plan.quant, grid_spec, problem.dtype,
    )  # fmt: skip


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
