"""The weights that a stack is made to imitate: its own, or those that give the dense model's outputs."""

from collections.abc import Sequence

from torch import Tensor

from srcr.numerics.cholesky import CholeskyFactor, factorize
from srcr.numerics.hessian import dense_target_
from srcr.solver.problem import LayerProblem, RowStack, stack_rows


def take_paired_targets(stacks: Sequence[RowStack], problem: LayerProblem) -> dict[str, Tensor]:
    """The dense targets [rows, cols] by name of every linear that is compensated, where the dense model saw
    only part of the tokens: by a factor of their own Hessian, which goes before another is made. Otherwise
    none. The cross moments are taken out of the problem's statistics."""
    statistics = problem.statistics
    names = [name for stack in stacks if stack.compensates for name in stack.names]
    if not (names and problem.spec.dense_targets and statistics.paired_hessian is not None):
        return {}
    factor = factorize(statistics.paired_hessian, None, problem.spec.dampening_frac)
    return {
        name: dense_target_(statistics.take_weight_cross(name), problem.weights[name], factor)
        for name in names
    }


def take_target(
    stack: RowStack, problem: LayerProblem, targets: dict[str, Tensor], factor: CholeskyFactor
) -> Tensor:
    """The target [rows, cols] of a stack: taken out of ``targets`` where they are there already, else made
    of the cross moments, which are taken out of the problem's statistics, else the stack's own weights."""
    statistics = problem.statistics
    if targets:
        return stack_rows([targets.pop(name) for name in stack.names])
    if problem.spec.dense_targets and statistics.weight_cross is not None:
        cross = stack_rows([statistics.take_weight_cross(name) for name in stack.names])
        target = dense_target_(cross, stack.W, factor)
        stack.release()
        return target
    return stack.W
