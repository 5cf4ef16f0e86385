"""95 % intervals by bootstrap over documents, paired by construction: one draw serves both models."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from srcr.types import Estimate

Array = npt.NDArray[np.float64]

RESAMPLES = 2000


def ratio_interval(total: Array, weight: Array, seed: int = 0) -> Estimate:
    """``sum(total) / sum(weight)`` over documents, with its 95 % percentile bootstrap interval.

    ``total`` and ``weight`` are one number a document [n]: for a mean over tokens, the document's sum
    and its count of tokens. Documents, not tokens, are drawn, since tokens of one are not independent.
    """
    return interval(lambda draw: total[draw].sum(-1) / weight[draw].sum(-1), len(total), seed)


def interval(
    statistic: Callable[[npt.NDArray[np.int64]], Array], n: int, seed: int = 0
) -> Estimate:
    """The bootstrap interval of ``statistic``, a function of document numbers [..., n] -> [...]."""
    rng = np.random.default_rng(seed)
    value = float(statistic(np.arange(n)))
    draws = statistic(rng.integers(0, n, size=(RESAMPLES, n)))
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(value, float(low), float(high), n)
