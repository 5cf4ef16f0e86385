"""Sr and SrCr: definitions, bounds, limits, intervals, and the exact McNemar test."""

from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srcr.metrics.retention import (
    PairedScores,
    compression,
    flips,
    item_scores,
    mcnemar,
    resampled_means,
    semantic_retention,
    sr_difference,
    srcr,
    task_retention,
    task_score,
)
from srcr.records.estimate import Estimate

shares = st.floats(0, 1)
widths = st.floats(1, 16)


def scores(base, compressed, chance=0.25):
    return PairedScores(np.array(base, dtype=float), np.array(compressed, dtype=float), chance)


def drawn(rng, n, base=0.9, lost=0.1, chance=0.25):
    """A task of n items: the base is right on a share, and the compressed model loses some of those."""
    right = rng.random(n) < base
    return scores(right, right & (rng.random(n) >= lost), chance)


def test_retention_is_normalised_by_chance():
    task = scores([1] * 8 + [0] * 2, [1] * 5 + [0] * 5, chance=0.25)
    kept = task_retention(task)
    assert kept.value == pytest.approx((0.5 - 0.25) / (0.8 - 0.25))
    assert kept.low <= kept.value <= kept.high


def test_below_chance_is_nothing_and_above_the_base_is_more_than_all():
    assert task_retention(scores([1] * 9 + [0], [0] * 10)).value == 0
    better = task_retention(scores([1] * 8 + [0] * 2, [1] * 10)).value
    assert better == pytest.approx(0.75 / 0.55)


@pytest.mark.parametrize(
    ("base", "chance"), [([0] * 10, 0.0), ([1, 0, 0, 0] * 5, 0.25), ([1] * 11 + [0] * 9, 0.5)]
)
def test_a_base_at_chance_has_nothing_to_retain(base, chance):
    guess = scores(base, base, chance)
    assert guess.at_chance
    assert task_retention(guess) is None
    assert semantic_retention({"guess": guess}) is None
    good = scores([1] * 18 + [0] * 2, [1] * 18 + [0] * 2, 0.25)
    assert semantic_retention({"guess": guess, "good": good}).value == 1


def test_sr_is_the_mean_over_tasks_whatever_their_sizes():
    rng = np.random.default_rng(0)
    tasks = {"a": drawn(rng, 400, lost=0.2), "b": drawn(rng, 40, chance=0.5), "c": drawn(rng, 90)}
    sr = semantic_retention(tasks)
    assert sr.value == pytest.approx(np.mean([task_retention(t).value for t in tasks.values()]))
    assert sr.low < sr.value < sr.high


def test_identical_models_keep_all_with_certainty():
    sr = semantic_retention({"a": scores([1] * 30 + [0] * 3, [1] * 30 + [0] * 3)})
    assert (sr.value, sr.low, sr.high) == (1, 1, 1)


@given(sparsity=shares, bits=widths)
def test_compression_is_bounded_and_monotone(sparsity, bits):
    c = compression(sparsity, bits)
    assert 0 <= c <= 1
    assert compression(min(1, sparsity + 0.01), bits) >= c - 1e-12
    assert compression(sparsity, max(1, bits - 0.1)) >= c - 1e-12


def test_limits_of_compression():
    assert compression(0, 16) == 0
    assert compression(0, 1) == compression(1, 16) == 1
    assert compression(0.25, 16) == 0.5
    assert compression(0, 4) == 0.5
    assert compression(0.25, 4) == 0.75


@pytest.mark.parametrize(("sparsity", "bits"), [(-0.1, 4), (1.1, 4), (0, 0.5), (0, 17)])
def test_compression_out_of_range(sparsity, bits):
    with pytest.raises(ValueError, match="not in"):
        compression(sparsity, bits)


@given(st.lists(st.floats(0, 1.3), min_size=3, max_size=3), shares, widths)
def test_srcr_is_bounded_and_zero_where_nothing_is_kept_or_nothing_is_smaller(
    parts, sparsity, bits
):
    low, value, high = sorted(parts)
    result = srcr(Estimate(value, (low, high)), sparsity, bits)
    assert 0 <= result.low <= result.value <= result.high <= 1
    assert srcr(Estimate(0, (0, 0)), sparsity, bits).value == 0
    assert srcr(Estimate(value, (low, high)), 0, 16).value == 0


@settings(max_examples=50)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 20))
def test_mcnemar_against_a_direct_sum(lost, won, same):
    base = np.array([1.0] * lost + [0.0] * won + [1.0] * (same + 1))
    ours = np.array([0.0] * lost + [1.0] * won + [1.0] * (same + 1))
    n = lost + won
    odds = [comb(n, k) / 2**n for k in range(n + 1)]
    expected = sum(p for p in odds if p <= odds[lost] * (1 + 1e-9))
    assert mcnemar(base, ours) == pytest.approx(expected)
    assert mcnemar(ours, base) == mcnemar(base, ours)
    assert flips(PairedScores(base, ours, 0)) == pytest.approx(n / len(base))


def test_mcnemar_of_many_items():
    rng = np.random.default_rng(0)
    base, ours = (rng.random((2, 20_000)) < 0.5).astype(float)
    assert 1e-4 < mcnemar(base, ours) <= 1
    assert mcnemar(np.ones(20_000), np.zeros(20_000)) == 0


def test_resampling_draws_items_whole():
    table = np.array([[1.0, 1.0], [0.0, 0.0], [0.5, 0.5], [0.5, 0.5]])
    means = resampled_means(table)
    assert np.array_equal(means[:, 0], means[:, 1])
    assert means[:, 0].mean() == pytest.approx(0.5, abs=0.02)
    assert means[:, 0].std() == pytest.approx(table[:, 0].std() / 2, rel=0.1)


def test_a_difference_is_paired():
    rng = np.random.default_rng(1)
    right = (rng.random(500) < 0.95).astype(float)
    ours, theirs = right.copy(), right.copy()
    ours[:10] = 0
    theirs[:30] = 0
    difference = sr_difference({"t": scores(right, ours)}, {"t": scores(right, theirs)})
    apart = [semantic_retention({"t": scores(right, part)}) for part in (ours, theirs)]
    assert difference.value == pytest.approx(apart[0].value - apart[1].value)
    assert difference.low > 0
    assert difference.high - difference.low < (apart[0].high - apart[0].low) + (
        apart[1].high - apart[1].low
    )
    with pytest.raises(ValueError, match="same base"):
        sr_difference({"t": scores(right, ours)}, {"u": scores(right, theirs)})
    with pytest.raises(ValueError, match="same base"):
        sr_difference({"t": scores(right, ours)}, {"t": scores(1 - right, theirs)})


@pytest.mark.slow
def test_intervals_of_sr_cover():
    """95 % intervals of Sr over two tasks hold the truth in 93 to 97 % of simulated evaluations."""
    rng = np.random.default_rng(2)
    truth = np.mean([(0.9 * 0.85 - 0.25) / 0.65, (0.8 * 0.7 - 0.125) / 0.675])
    held = 0
    rounds = 600
    for _ in range(rounds):
        tasks = {
            "a": drawn(rng, 500, 0.9, 0.15, 0.25),
            "b": drawn(rng, 300, 0.8, 0.3, 0.125),
        }
        sr = semantic_retention(tasks, seed=int(rng.integers(1 << 30)))
        held += sr.low <= truth <= sr.high
    assert 0.93 <= held / rounds <= 0.97


def test_a_base_just_above_chance_does_not_blow_the_interval_up():
    base, ours = np.zeros(200), np.zeros(200)
    base[:63], ours[:58] = 1, 1
    kept = task_retention(PairedScores(base, ours, 0.25))
    assert kept.value == pytest.approx((0.29 - 0.25) / (0.315 - 0.25))
    assert kept.high < 10
    few = PairedScores(np.array([1.0] * 3 + [0.0] * 97), np.array([1.0] * 2 + [0.0] * 98), 0.0)
    assert task_retention(few).high < 10
    single = PairedScores(np.array([1.0] + [0.0] * 99), np.zeros(100), 0.0)
    assert task_retention(single) is None


def test_a_tasks_score_says_all_of_it():
    pair = scores([1] * 8 + [0] * 2, [1] * 5 + [0] * 5)
    score = task_score(pair, "acc")
    assert (score.base, score.compressed, score.chance, score.n) == (0.8, 0.5, 0.25, 10)
    assert score.retention == pytest.approx(task_retention(pair).value)
    assert score.ci95 == task_retention(pair).ci95
    assert (score.metric, score.flips, score.note) == ("acc", 0.3, None)
    assert score.p_value == mcnemar(pair.base, pair.compressed)
    at_chance = task_score(scores([0] * 10, [0] * 10, 0.0), "acc")
    assert at_chance.retention is at_chance.ci95 is None
    assert "at chance" in at_chance.note


def test_items_are_kept_as_short_numbers():
    kept = item_scores(scores([1, 0, 0.5], [0, 1, 0.25]))
    assert repr(kept.base) == "(1, 0, 0.5)"
    assert kept.compressed == (0, 1, 0.25)
