"""The slow, obvious versions of the numerical core: float64, explicit inverses, one weight at a time.

Written from the equations (Optimal Brain Surgeon; SparseGPT, arXiv 2301.00774; GPTQ, arXiv
2210.17323), not from the code they check.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

#: ``(current weights [rows, cols], columns of the span in sweep order) -> keep [rows, span]``.
Choose = Callable[[Array, list[int]], Bools]


@dataclass(frozen=True)
class Grid:
    """``(code - zero) * scale`` with one scale (and zero) a row and group of columns. ``product`` is
    the precision in which the engine multiplies."""

    scale: Array
    zero: Array | None
    num_bits: int
    group_size: int
    product: type = np.float64

    def round_one(self, w: float, row: int, col: int) -> tuple[int, float]:
        """The nearest code, and how far (in steps) ``w`` was from being rounded otherwise."""
        group = col // self.group_size
        position = w / self.scale[row, group] + self._zero(row, group)
        low, high = -(2 ** (self.num_bits - 1)), 2 ** (self.num_bits - 1) - 1
        code = min(max(int(np.rint(position)), low), high)
        inside = low < position < high
        return code, abs(position - np.floor(position) - 0.5) if inside else 0.5

    def value(self, code: int, row: int, col: int) -> float:
        """What a code stands for."""
        group = col // self.group_size
        steps = self.product(code - self._zero(row, group))
        return float(steps * self.product(self.scale[row, group]))

    def zero_code(self, row: int, col: int) -> int:
        return int(self._zero(row, col // self.group_size))

    def _zero(self, row: int, group: int) -> float:
        return 0.0 if self.zero is None else self.zero[row, group]


@dataclass(frozen=True)
class Swept:
    """``margin`` is how close the nearest rounding decision came to a tie, in steps."""

    weight: Array
    codes: npt.NDArray[np.int64]
    keep: Bools
    loss: Array
    margin: float


def sweep(
    W: Array,
    H: Array,
    order: list[int],
    damp: float = 0.0,
    choose: Choose | None = None,
    span: int = 1,
    grid: Grid | None = None,
    push: bool = True,
) -> Swept:
    """Fix one column after the other; spread each weight's error over the columns that remain by

    ``dw = - (w - fixed) / [H_R^-1]_00 * H_R^-1[0]`` with H_R the damped Hessian of what remains.
    """
    rows, cols = W.shape
    damped = H + damp * np.eye(cols)
    work = W.astype(np.float64).copy()
    fixed = np.zeros_like(work)
    codes = np.zeros((rows, cols), dtype=np.int64)
    keep = np.ones((rows, cols), dtype=bool)
    loss = np.zeros(rows)
    margin = 0.5
    for j, col in enumerate(order):
        if choose is not None and j % span == 0:
            columns = order[j : j + span]
            keep[:, columns] = choose(work, columns)
        remaining = order[j:]
        inverse = np.linalg.inv(damped[np.ix_(remaining, remaining)])
        for row in range(rows):
            w = work[row, col]
            if not keep[row, col]:
                value = 0.0
                if grid is not None:
                    codes[row, col] = grid.zero_code(row, col)
                if not push:
                    continue
            elif grid is not None:
                codes[row, col], distance = grid.round_one(w, row, col)
                margin = min(margin, distance)
                value = grid.value(codes[row, col], row, col)
            else:
                value = w
            fixed[row, col] = value
            work[row, remaining] -= (w - value) / inverse[0, 0] * inverse[0]
            loss[row] += (w - value) ** 2 / inverse[0, 0]
    return Swept(fixed, codes, keep, loss, margin)


def descend(
    start: Swept, target: Array, H: Array, order: list[int], damp: float, grid: Grid | None
) -> Swept:
    """Give each weight in turn the value that is best with all others in place: on a grid by trying
    every code, else where the derivative of the damped output error is 0."""
    damped = H + damp * np.eye(H.shape[0])

    def error(row: int, col: int, value: float) -> float:
        delta = weight[row] - target[row]
        delta[col] = value - target[row, col]
        return float(delta @ damped @ delta)

    weight, codes = start.weight.copy(), start.codes.copy()
    margin = 0.5
    for col in order:
        for row in range(weight.shape[0]):
            if not start.keep[row, col]:
                continue
            if grid is None:
                slope = 2 * (weight[row] - target[row]) @ damped[:, col]
                weight[row, col] -= slope / (2 * damped[col, col])
                continue
            levels = range(-(2 ** (grid.num_bits - 1)), 2 ** (grid.num_bits - 1))
            errors = sorted((error(row, col, grid.value(c, row, col)), c) for c in levels)
            step = grid.scale[row, col // grid.group_size] ** 2 * damped[col, col]
            margin = min(margin, (errors[1][0] - errors[0][0]) / (2 * step))
            codes[row, col] = errors[0][1]
            weight[row, col] = grid.value(codes[row, col], row, col)
    loss = np.array([w @ damped @ w for w in weight - target])
    return Swept(weight, codes, start.keep, loss, margin)


def refit(start: Swept, target: Array, H: Array, damp: float, grid: Grid, group: int) -> Swept:
    """Give each row's scale of a group the value that is best with its codes as they are; ``grid`` and the
    weights change in place."""
    damped = H + damp * np.eye(H.shape[0])
    columns = range(group * grid.group_size, (group + 1) * grid.group_size)
    for row in range(start.weight.shape[0]):
        steps = np.zeros(H.shape[0])
        for col in columns:
            steps[col] = start.codes[row, col] - grid._zero(row, group)
        energy = steps @ damped @ steps
        if energy > 0:
            rest = start.weight[row] - steps * grid.scale[row, group]
            grid.scale[row, group] = (target[row] - rest) @ damped @ steps / energy
            start.weight[row] = rest + steps * grid.scale[row, group]
    return start


def removal_costs(H: Array, order: list[int], damp: float) -> Array:
    """``1 / [H_R^-1]_jj`` of each column (by column number), R = j and all that come after it."""
    damped = H + damp * np.eye(len(order))
    costs = np.zeros(len(order))
    for j, col in enumerate(order):
        remaining = order[j:]
        costs[col] = 1 / np.linalg.inv(damped[np.ix_(remaining, remaining)])[0, 0]
    return costs


def all_but_lowest(scores: Array, count: int) -> Bools:
    """Prune the ``count`` lowest of a whole matrix; of equals, the first in reading order."""
    flat = scores.reshape(-1)
    keep = np.ones(flat.size, dtype=bool)
    for index in sorted(range(flat.size), key=lambda i: (flat[i], i))[:count]:
        keep[index] = False
    return keep.reshape(scores.shape)


def n_of_m(scores: Array, kept: int, group: int) -> Bools:
    """Keep the ``kept`` highest of every ``group`` neighbours of a row."""
    keep = np.ones(scores.shape, dtype=bool)
    for row in range(scores.shape[0]):
        for start in range(0, scores.shape[1], group):
            part = slice(start, start + group)
            keep[row, part] = all_but_lowest(scores[row, part], group - kept)
    return keep


def dense_target(W: Array, X: Array, X_dense: Array, damp: float) -> Array:
    """Least squares with the ridge as extra rows: ``|X W'^T - X_d W^T|^2 + damp |W' - W|^2``; and four
    fifths of the way there."""
    ridge = np.sqrt(damp) * np.eye(W.shape[1])
    left = np.vstack([X, ridge])
    right = np.vstack([X_dense @ W.T, ridge @ W.T])
    return 0.2 * W + 0.8 * np.linalg.lstsq(left, right, rcond=None)[0].T


@dataclass(frozen=True)
class Divergence:
    kl: float
    percentiles: tuple[float, ...]
    top1: float
    flips: float
    base_perplexity: float
    perplexity: float


def divergence(base: Array, ours: Array, ids: npt.NDArray[np.int64]) -> Divergence:
    """KL, agreement and perplexity over the positions that predict a token, one by one."""

    def log_probabilities(logits: Array) -> Array:
        shifted = logits - logits.max()
        return shifted - np.log(np.exp(shifted).sum())

    kls, same, flipped, base_nll, nll = [], [], [], [], []
    for document in range(ids.shape[0]):
        for position in range(ids.shape[1] - 1):
            p = log_probabilities(base[document, position].astype(np.float64))
            q = log_probabilities(ours[document, position].astype(np.float64))
            target = ids[document, position + 1]
            kls.append(sum(np.exp(p) * (p - q)))
            same.append(p.argmax() == q.argmax())
            flipped.append((p.argmax() == target) != (q.argmax() == target))
            base_nll.append(-p[target])
            nll.append(-q[target])
    kls.sort()

    def percentile(percent: float) -> float:
        at = percent / 100 * (len(kls) - 1)  # linear interpolation between neighbours
        below = int(at)
        above = min(below + 1, len(kls) - 1)
        return float(kls[below] + (at - below) * (kls[above] - kls[below]))

    return Divergence(
        float(np.mean(kls)), tuple(percentile(p) for p in (50, 95, 99, 99.9)), float(np.mean(same)),
        float(np.mean(flipped)), float(np.exp(np.mean(base_nll))), float(np.exp(np.mean(nll))),
    )  # fmt: skip
