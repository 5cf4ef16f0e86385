"""Which elements of a coupling go, and what its consumers become."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from srcr.numerics.cholesky import factorize
from srcr.numerics.elements import choose_elements, damped, refit
from srcr.numerics.hessian import LayerStatistics, dense_map_, dense_target_
from srcr.numerics.products import product

#: ``(W [rows, cols], damped H [cols, cols] float64, columns of an element, how many)`` -> numbers of the
#: elements that go [count], ascending.
Choose = Callable[[Tensor, Tensor, int, int], Tensor]


@dataclass(frozen=True)
class RemovalMethod:
    """How elements are removed: which ``choose`` names; whether what is left ``compensates`` for them; and
    whether it does so to give the dense model's outputs (``dense_targets``), or those of its own inputs."""

    choose: Choose = choose_elements
    compensates: bool = True
    dense_targets: bool = True
    dampening_frac: float = 0.01


@dataclass(frozen=True, eq=False)
class ConsumerProblem:
    """The consumers of a coupling: dense ``weights`` [rows, cols] float32 by the name of the linear, the
    ``statistics`` of their input, columns of an element (``size``), and the ``count`` of elements that go."""

    weights: dict[str, Tensor]
    statistics: LayerStatistics
    size: int
    count: int


@dataclass(frozen=True, eq=False)
class Removed:
    """The ``elements`` that go, ascending; the ``weights`` [rows, cols] of the consumers, zero in their
    columns; and the output ``error`` (relative, squared) of what is left."""

    elements: tuple[int, ...]
    weights: dict[str, Tensor]
    error: float


def remove_elements(problem: ConsumerProblem, method: RemovalMethod) -> Removed:
    """What goes, and what the consumers become.

    Raises:
        NumericalError: the Hessian cannot be factorised.
    """
    names, statistics = list(problem.weights), problem.statistics
    W = torch.cat([problem.weights[name] for name in names])
    target = _target(W, names, statistics, method)
    dead = statistics.hessian.diagonal() == 0
    target[:, dead] = 0.0  # whatever it is, nothing is multiplied by it
    H = damped(statistics.hessian, method.dampening_frac)
    elements = method.choose(target, H, problem.size, problem.count)
    offsets = torch.arange(problem.size, device=elements.device)
    gone = (elements[:, None] * problem.size + offsets).reshape(-1)
    left = torch.ones(W.shape[1], dtype=torch.bool, device=W.device)
    left[gone] = False
    final = torch.zeros_like(W)
    final[:, left] = refit(target, H, gone).to(W.dtype) if method.compensates else W[:, left]
    delta = (final - target).to(torch.float64)
    energy = float((target.to(torch.float64) @ H * target).sum())
    error = float((delta @ H * delta).sum()) / max(energy, 1e-300)
    parts = torch.split(final, [len(problem.weights[name]) for name in names])
    return Removed(tuple(elements.tolist()), dict(zip(names, parts, strict=True)), error)


def _target(
    W: Tensor, names: Sequence[str], statistics: LayerStatistics, method: RemovalMethod
) -> Tensor:
    """The weights [rows, cols] that what is left imitates."""
    if not method.dense_targets:
        return W.clone()
    paired = statistics.paired_hessian
    hessian = statistics.hessian if paired is None else paired
    factor = factorize(hessian, None, method.dampening_frac)
    if statistics.input_cross is not None:
        return product(W, dense_map_(statistics.take_input_cross(), factor))
    cross = torch.cat([statistics.take_weight_cross(name) for name in names])
    return dense_target_(cross, W, factor)
