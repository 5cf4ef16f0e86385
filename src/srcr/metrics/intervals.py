"""95 % intervals by bootstrap over documents, paired by construction: one draw serves both models.

Both kinds correct for skew, which the plain percentile interval does not: on 64 documents with skewed
losses it covers the truth 90 to 93 times in 100, the studentised one 94 times.
"""

from collections.abc import Callable, Iterator
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from srcr.records.estimate import Estimate

Array = npt.NDArray[np.float64]

RESAMPLES = 2000
#: Numbers drawn at a time.
CHUNK = 1 << 20
#: Groups left out in turn to estimate skew; up to so many documents, each is a group.
JACKKNIFE = 400
_TAILS = (0.025, 0.975)
_NORMAL = NormalDist()


def ratio_interval(total: Array, weight: Array, seed: int = 0) -> Estimate:
    """``sum(total) / sum(weight)`` over documents, with its studentised bootstrap interval (bootstrap-t:
    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 12.5).

    ``total`` and ``weight`` > 0 are one number a document [n]: for a mean over tokens, the document's
    sum and its count of tokens. Documents, not tokens, are drawn, since tokens of one are not
    independent. The interval never leaves the range of the documents' own ratios. A draw's standard
    error is not trusted below a quarter of the data's, else draws of few distinct documents decide.
    """
    n = len(total)
    value, error = _ratio(total, weight)
    if error == 0:
        return Estimate(float(value), (float(value), float(value)))
    draws = [_ratio(total[draw], weight[draw]) for draw in _draws(n, seed)]
    values, errors = (np.concatenate(part) for part in zip(*draws, strict=True))
    t = (values - value) / np.maximum(errors, error / 4)
    high, low = value - error * np.quantile(t, _TAILS)
    ratios = total / weight
    low, high = np.clip([low, high], ratios.min(), ratios.max())
    return Estimate(float(value), (float(low), float(high)))


def interval(
    statistic: Callable[[npt.NDArray[np.int64]], Array], n: int, seed: int = 0
) -> Estimate:
    """The bootstrap interval of ``statistic``, a function of document numbers [..., m] -> [...], any m:
    bias-corrected and accelerated (BCa: Efron and Tibshirani, section 14.3)."""
    everything = np.arange(n)
    value = float(statistic(everything))
    draws = np.concatenate([statistic(draw) for draw in _draws(n, seed)])
    tied = np.isclose(draws, value, rtol=1e-12, atol=0)
    below = float(np.where(tied, 0.5, draws < value).mean())
    if not 0 < below < 1:  # no bias can be told from draws that all lie on one side
        low, high = np.quantile(draws, _TAILS)
        return Estimate(value, (float(low), float(high)))
    bias = _NORMAL.inv_cdf(below)
    skew = _acceleration(statistic, n)
    shifted = [bias + _NORMAL.inv_cdf(tail) for tail in _TAILS]
    tails = [_NORMAL.cdf(bias + z / (1 - skew * z)) for z in shifted]
    low, high = np.quantile(draws, tails)
    return Estimate(value, (float(low), float(high)))


def _draws(n: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Document numbers drawn with replacement, RESAMPLES rows of n in all, some rows at a time so that
    memory does not grow with their product."""
    rng = np.random.default_rng(seed)
    rows = max(1, min(RESAMPLES, CHUNK // n))
    for start in range(0, RESAMPLES, rows):
        yield rng.integers(0, n, size=(min(rows, RESAMPLES - start), n))


def _ratio(total: Array, weight: Array) -> tuple[Array, Array]:
    """The ratio of sums over the last axis, and its standard error by linearisation."""
    sums = weight.sum(-1)
    ratio = total.sum(-1) / sums
    residual = total - ratio[..., None] * weight
    return ratio, np.sqrt((residual**2).sum(-1)) / sums


def _acceleration(statistic: Callable[[npt.NDArray[np.int64]], Array], n: int) -> float:
    """How fast the statistic's standard error changes with its value, from the jackknife's skew."""
    groups = min(n, JACKKNIFE)
    if groups < 2:
        return 0.0
    number = np.arange(n)
    left = np.array([float(statistic(number[number % groups != g])) for g in range(groups)])
    influence = left.mean() - left
    scale = float((influence**2).sum())
    return float((influence**3).sum() / (6 * scale**1.5)) if scale > 1e-300 else 0.0
