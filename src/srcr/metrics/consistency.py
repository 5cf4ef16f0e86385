"""Mean similarity of continuations in pairs, its chance level, and both in a normalised value."""

import numpy as np
import numpy.typing as npt

from srcr.metrics.intervals import interval
from srcr.records.estimate import Estimate

Array = npt.NDArray[np.float64]
#: A chance level above this leaves nothing to normalise by: all texts are alike.
HIGHEST_CHANCE = 1 - 1e-6


def consistency_estimates(
    similarity: Array, base: Array, compressed: Array
) -> tuple[Estimate, float, Estimate | None]:
    """Mean similarity, chance level, and normalised similarity, with intervals over prompts.

    Both intervals draw prompts. The chance level is computed anew in every draw, since it moves with
    the same prompts; there a prompt that was drawn twice is not paired with itself, which would count
    the similarity that is being measured as chance.
    """
    n = len(similarity)
    consistency = interval(lambda draw: similarity[draw].mean(-1), n)
    chance = float(chance_level(np.ones(n), base, compressed))
    if not chance < HIGHEST_CHANCE:
        return consistency, chance, None

    def normalised(draw: npt.NDArray[np.int64]) -> Array:
        counts = draw_counts(draw, n)
        level = chance_level(counts, base, compressed)
        level = np.where(
            level < HIGHEST_CHANCE, level, chance
        )  # a draw of one prompt alone has none
        mean: Array = counts @ similarity / draw.shape[-1]
        return (mean - level) / (1 - level)

    return consistency, chance, interval(normalised, n)


def chance_level(counts: Array, base: Array, compressed: Array) -> Array:
    """Mean of ``base_i . compressed_j`` over all i != j, prompt i taken ``counts[..., i]`` times; NaN where
    there is no such pair."""
    twice = counts**2
    cosines = ((counts @ base) * (counts @ compressed)).sum(-1) - twice @ (base * compressed).sum(1)
    pairs = counts.sum(-1) ** 2 - twice.sum(-1)
    level: Array = np.where(pairs > 0, cosines, np.nan) / np.maximum(pairs, 1)
    return level


def draw_counts(draw: npt.NDArray[np.int64], n: int) -> Array:
    """How often each of n prompts was drawn: [..., m] -> [..., n]."""
    rows = draw.reshape(-1, draw.shape[-1])
    cells = rows + n * np.arange(len(rows))[:, None]
    counts = np.bincount(cells.ravel(), minlength=n * len(rows))
    return counts.reshape(*draw.shape[:-1], n).astype(np.float64)
