"""A layer's problem becomes a compressed weight for each of its linears.

The linears share an input, so they share the Hessian and its factorisation; those that are compressed the
same way are stacked by rows and swept together. Modes (Laborde et al., arXiv 2505.07289, section III):
``joint`` chooses the mask and rounds the rest in a single sweep, what pruning costs measured against what
rounding would have cost (:mod:`srcr.solver.one_pass`); the paper's two sequences are in
:mod:`srcr.solver.sequences`.
"""

import torch
from torch import Tensor

from srcr.numerics import masks
from srcr.numerics.cholesky import factorize
from srcr.numerics.compressed import CompressedWeight
from srcr.numerics.hessian import DampedHessian, activation_order, output_energy, output_error
from srcr.plans.specs import SolverSpec
from srcr.solver.one_pass import solve_directly, solve_in_one_pass
from srcr.solver.polish import polish_
from srcr.solver.problem import Factors, LayerProblem, RowStack, Solution, stack_linears
from srcr.solver.sequences import solve_in_sequence
from srcr.solver.targets import DenseTargets


def solve(problem: LayerProblem, factors: Factors | None = None) -> dict[str, CompressedWeight]:
    """The compressed weight of each linear by name; linears whose plan is empty are left out.

    The cross moments are taken out of ``problem.statistics``. ``factors`` of these very statistics are taken
    from there where they are known, and put there where they are not, so that many plans cost a single
    factorisation.

    Raises:
        InputError: a group size or N:M pattern does not divide the width, or a method is not known.
        NumericalError: the Hessian cannot be factorised.
    """
    result: dict[str, CompressedWeight] = {}
    shared = factors is not None
    factors = {} if factors is None else factors
    stacks = stack_linears(problem)
    targets = DenseTargets(stacks, problem)
    while stacks:  # each goes as soon as it is done
        stack = stacks.pop(0)
        result |= _solve_stack(stack, problem, targets, factors, not stacks and not shared)
    return {name: result[name] for name in problem.weights if name in result}


def _solve_stack(
    stack: RowStack,
    problem: LayerProblem,
    targets: DenseTargets,
    factors: Factors,
    last: bool,
) -> dict[str, CompressedWeight]:
    """:func:`solve` of a stack; its target is taken out of ``targets``. The ``factors`` go as soon as the
    ``last`` stack has no more use for them: polishing is where most memory is needed."""
    hessian, spec = problem.statistics.hessian, problem.spec
    if not stack.compensates:
        stack.release()
        solution = solve_directly(stack, hessian.diagonal())
        stack.release()
        return _split(stack, solution, hessian, None)
    _add_factor(factors, stack, hessian, spec)
    factor = factors[stack.factor_key]
    stack.release()
    target = targets.take(stack, factor)
    if last:
        targets.release()
    sequential = spec.mode != "joint" or (
        stack.quantizer is not None and not stack.quantizer.compensates
    )
    both = stack.pruner is not None and stack.quantizer is not None
    method = solve_in_sequence if sequential and both else solve_in_one_pass
    solution = method(stack, target, factor, hessian.diagonal(), spec)
    error = None
    if solution.refined_target is not None:
        damped = DampedHessian(hessian, factor.damp)
        del factor
        if last:
            factors.clear()
        stack.release()
        solution, error = polish_(stack, solution, damped, spec)
    stack.release()
    return _split(stack, solution, hessian, error if solution.refined_target is target else None)


def _add_factor(factors: Factors, stack: RowStack, hessian: Tensor, spec: SolverSpec) -> None:
    """Put the factor that the stack is swept by among the ``factors``, unless it is there."""
    if stack.factor_key in factors:
        return
    masks.check_width(stack.pattern, stack.W.shape[1])
    ordered, multiple = stack.factor_key
    order = activation_order(hessian.diagonal(), multiple) if ordered else None
    factors[stack.factor_key] = factorize(hessian, order, spec.dampening_frac)


def _split(
    stack: RowStack, solution: Solution, hessian: Tensor, errors: Tensor | None
) -> dict[str, CompressedWeight]:
    """Each linear of a solved stack, and its output error relative to its target's output energy;
    ``errors`` [rows] are known where the weights were refined on a grid."""
    result = {}
    start = 0
    for name, size, sparsity in zip(stack.names, stack.sizes, stack.sparsities, strict=True):
        rows = slice(start, start + size)
        start += size
        weights, target = solution.weights.rows(rows), solution.target[rows]
        values = None if weights.codes is not None else weights.weight.to(stack.dtype)
        if errors is not None and values is None:
            error = float(errors[rows].sum(dtype=torch.float64))
        else:
            final = weights.weight if values is None else values
            error = output_error(target, hessian, final)
        total = output_energy(target, hessian)
        pruned = weights.mask is not None and sparsity > 0
        result[name] = CompressedWeight(
            mask=weights.mask.clone() if weights.mask is not None and pruned else None,
            error=max(0.0, error / total) if total > 0 else 0.0,
            codes=None if weights.codes is None else weights.codes.clone(),
            grid=None if solution.grid is None else solution.grid.rows(rows),
            values=values,
        )
    return result
