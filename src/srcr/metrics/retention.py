"""Sr and SrCr: how much of what the base could do is left, and that together with the compression.

Definitions: Laborde et al., arXiv 2505.07289, section III; SrCr's form is our reading, see
:func:`compression`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from srcr.metrics.intervals import RESAMPLES
from srcr.records.estimate import Estimate
from srcr.records.evaluation import ItemScores, TaskScore

Array = npt.NDArray[np.float64]
Statistic = Callable[[Array], Array]

AT_CHANCE = "the base is at chance here: retention is undefined, and the task is not in Sr"
#: One-sided normal quantile: a base whose accuracy is not above chance at 5 % is "at chance".
_ABOVE_CHANCE = 1.645


@dataclass(frozen=True, eq=False)
class PairedScores:
    """Scores of both models on the same items of a task, in the same order, each in [0, 1]: ``base`` and
    ``compressed`` [n]; ``chance`` is what guessing scores (0 for generation)."""

    base: Array
    compressed: Array
    chance: float

    @property
    def at_chance(self) -> bool:
        """Whether the base is not distinguishable from guessing, so that it has nothing to retain."""
        spread = max(self.base.std(), math.sqrt(self.chance * (1 - self.chance)))
        above = float(self.base.mean()) - self.chance
        return above <= _ABOVE_CHANCE * float(spread) / math.sqrt(len(self.base))


def retention(base: Array, compressed: Array, chance: float) -> Array:
    """``max(0, (compressed - chance) / (base - chance))`` of accuracies; the first of ``base`` is the
    observed one, above chance, the others are draws. A draw's divisor is not trusted below a quarter of
    the observed one, else the draws in which the base guesses decide the interval."""
    above = base - chance
    kept = (compressed - chance) / np.maximum(above, above[:1] / 4)
    return np.maximum(0.0, kept)


def resampled_means(scores: Array, seed: int = 0) -> Array:
    """Bootstrap means [resamples, columns] of ``scores`` [items, columns]: items are drawn whole, so
    columns stay paired. Equal rows are drawn together, by a multinomial count."""
    rows, counts = np.unique(scores, axis=0, return_counts=True)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(scores), counts / len(scores), size=RESAMPLES)
    means: Array = draws @ rows / len(scores)
    return means


def task_retention(scores: PairedScores, seed: int = 0) -> Estimate | None:
    """The retention of one task with its 95 % interval over items; None where the base is at chance."""
    if scores.at_chance:
        return None
    return _estimate(_columns([scores]), [scores.chance], seed, _first)


def semantic_retention(tasks: Mapping[str, PairedScores], seed: int = 0) -> Estimate | None:
    """Sr: the mean retention over the tasks whose base is above chance; None where there is none.

    The interval draws the items of each task anew, and both models' answers with them."""
    kept = [scores for scores in tasks.values() if not scores.at_chance]
    if not kept:
        return None
    return _estimate(_columns(kept), [s.chance for s in kept], seed, _first)


def sr_difference(
    ours: Mapping[str, PairedScores], theirs: Mapping[str, PairedScores], seed: int = 0
) -> Estimate | None:
    """Sr(ours) - Sr(theirs) of two compressed versions of one base on the same items, paired.

    Raises:
        ValueError: the two were not measured on the same tasks with the same base.
    """
    if ours.keys() != theirs.keys() or any(
        not np.array_equal(ours[name].base, theirs[name].base) for name in ours
    ):
        raise ValueError("a paired difference needs the same base, tasks and items")
    kept = [name for name in ours if not ours[name].at_chance]
    if not kept:
        return None
    columns = [
        np.stack([ours[name].base, ours[name].compressed, theirs[name].compressed], axis=1)
        for name in kept
    ]
    chances = [ours[name].chance for name in kept]
    return _estimate(columns, chances, seed, lambda kept: kept[..., 0] - kept[..., 1])


def compression(sparsity: float, bits: float) -> float:
    """SrCr's compression term in [0, 1], rising with sparsity and with fewer bits.

    The paper's own formula is known to us second-hand: retention, times a square-root term in sparsity
    and a logarithmic term in bits. Our reading is ``c_p = sqrt(s)``, ``c_q = log2(16 / q) / 4``,
    composed as TCr composes them: ``1 - (1 - c_p)(1 - c_q)``. It is 0 for the untouched model and 1
    where nothing is kept, or one bit.

    Raises:
        ValueError: ``sparsity`` outside [0, 1], or ``bits`` outside [1, 16].
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity {sparsity} is not in [0, 1]")
    if not 1 <= bits <= 16:
        raise ValueError(f"bits {bits} is not in [1, 16]")
    return 1 - (1 - math.sqrt(sparsity)) * (1 - math.log2(16 / bits) / 4)


def srcr(sr: Estimate, sparsity: float, bits: float) -> Estimate:
    """SrCr: Sr times :func:`compression`, capped at 1; the interval is Sr's."""
    c = compression(sparsity, bits)
    value, low, high = (min(1.0, part) * c for part in (sr.value, sr.low, sr.high))
    return Estimate(value, (low, high))


def mcnemar(base: Array, compressed: Array) -> float:
    """Exact two-sided McNemar p-value: items that only one model gets right are a fair coin if the two
    are equally good (a score counts as right from 0.5)."""
    lost = int(((base >= 0.5) & (compressed < 0.5)).sum())
    won = int(((base < 0.5) & (compressed >= 0.5)).sum())
    n = lost + won
    ways, tail = 1, 0  # ways: n over k
    for k in range(min(lost, won) + 1):
        tail += ways
        ways = ways * (n - k) // (k + 1)
    return float(min(1.0, 2 * tail / 2**n))


def flips(scores: PairedScores) -> float:
    """Share of items that one model gets right and the other does not, whichever way."""
    return float(((scores.base >= 0.5) != (scores.compressed >= 0.5)).mean())


def task_score(scores: PairedScores, metric: str) -> TaskScore:
    """What a task says of both models, under its ``metric``."""
    kept = task_retention(scores)
    return TaskScore(
        base=float(scores.base.mean()),
        compressed=float(scores.compressed.mean()),
        chance=scores.chance,
        n=len(scores.base),
        retention=None if kept is None else kept.value,
        ci95=None if kept is None else kept.ci95,
        p_value=mcnemar(scores.base, scores.compressed),
        flips=flips(scores),
        metric=metric,
        note=None if kept is not None else AT_CHANCE,
    )


def item_scores(scores: PairedScores) -> ItemScores:
    """Scores as short JSON numbers."""
    return ItemScores(_short(scores.base), _short(scores.compressed))


def _short(scores: Array) -> tuple[float, ...]:
    return tuple(int(score) if score in (0, 1) else float(score) for score in scores)


def _columns(tasks: Sequence[PairedScores]) -> list[Array]:
    return [np.stack([scores.base, scores.compressed], axis=1) for scores in tasks]


def _first(kept: Array) -> Array:
    first: Array = kept[..., 0]
    return first


def _estimate(
    columns: Sequence[Array], chances: Sequence[float], seed: int, statistic: Statistic
) -> Estimate:
    """``statistic`` of the mean retention over tasks of every column after the first, which is the base;
    with its percentile bootstrap interval."""
    resampled = [resampled_means(part, seed + i) for i, part in enumerate(columns)]
    means = [
        np.concatenate([part.mean(0)[None], r]) for part, r in zip(columns, resampled, strict=True)
    ]
    kept = np.mean(
        [retention(m[:, :1], m[:, 1:], chance) for m, chance in zip(means, chances, strict=True)],
        axis=0,
    )
    value, *draws = statistic(kept)
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(float(value), (float(low), float(high)))
