"""The weights that a stack is made to imitate: its own, or those that give the dense model's outputs."""

from collections.abc import Sequence

from torch import Tensor

from srcr.numerics.cholesky import CholeskyFactor, factorize
from srcr.numerics.hessian import dense_map_, dense_target_
from srcr.numerics.products import product
from srcr.solver.problem import LayerProblem, RowStack, stack_rows


class DenseTargets:
    """What the linears of a problem imitate: the weights that best reproduce the dense model's outputs.

    The cross moments are taken out of the problem's statistics, and each target out of this: their memory
    goes from hand to hand.
    """

    def __init__(self, stacks: Sequence[RowStack], problem: LayerProblem) -> None:
        self._problem = problem
        self._map: Tensor | None = None  # of any weight to its target
        self._targets: dict[str, Tensor] = {}
        statistics = problem.statistics
        names = [name for stack in stacks if stack.compensates for name in stack.names]
        measured = statistics.weight_cross is not None or statistics.input_cross is not None
        self._wanted = measured and problem.spec.dense_targets
        if not (names and self._wanted and statistics.paired_hessian is not None):
            return
        # By a factor of their own tokens' Hessian, which goes before another is made.
        factor = factorize(statistics.paired_hessian, None, problem.spec.dampening_frac)
        if statistics.input_cross is not None:
            self._map = dense_map_(statistics.take_input_cross(), factor)
            return
        for name in names:
            cross, W = statistics.take_weight_cross(name), problem.weights[name]
            self._targets[name] = dense_target_(cross, W, factor)

    def take(self, stack: RowStack, factor: CholeskyFactor) -> Tensor:
        """The target [rows, cols] of a stack, by its ``factor`` where the dense model saw all tokens; the
        stack's own weights where dense targets are not wanted."""
        statistics = self._problem.statistics
        if not self._wanted:
            return stack.W
        if self._targets:
            return stack_rows([self._targets.pop(name) for name in stack.names])
        if self._map is None and statistics.input_cross is not None:
            self._map = dense_map_(statistics.take_input_cross(), factor)
        if self._map is not None:
            return product(stack.W, self._map)
        cross = stack_rows([statistics.take_weight_cross(name) for name in stack.names])
        target = dense_target_(cross, stack.W, factor)
        stack.release()
        return target

    def release(self) -> None:
        """Let go of what the last stack has no more use for."""
        self._map = None
