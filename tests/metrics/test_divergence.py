"""Divergence against an independent computation in float64, token by token."""

import math

import numpy as np
import pytest
import torch

import reference
from srcr.errors import NumericalError
from srcr.metrics.divergence import DivergenceAccumulator

DOCUMENTS, LENGTH, VOCABULARY = 6, 11, 23


def logits(seed, noise=0.5):
    """(base, compressed, token ids) of a few documents."""
    generator = torch.Generator().manual_seed(seed)
    shape = DOCUMENTS, LENGTH, VOCABULARY
    base = 3 * torch.randn(shape, generator=generator)
    ours = base + noise * torch.randn(shape, generator=generator)
    return base, ours, torch.randint(0, VOCABULARY, shape[:2], generator=generator)


def measure(base, ours, ids, batch=DOCUMENTS):
    totals = DivergenceAccumulator()
    for start in range(0, len(ids), batch):
        part = slice(start, start + batch)
        totals.add(base[part], ours[part], ids[part])
    return totals.result()


def percentiles(result):
    """Those of KL."""
    return result.kl.p50, result.kl.p95, result.kl.p99, result.kl.p999


def assert_matches(result, base, ours, ids):
    expected = reference.divergence(base.float().numpy(), ours.float().numpy(), ids.numpy())
    assert result.kl.value == pytest.approx(expected.kl, rel=1e-5)
    assert percentiles(result) == pytest.approx(expected.percentiles, rel=1e-5)
    assert result.top1_agreement.value == pytest.approx(expected.top1, rel=1e-9)
    assert result.flips.value == pytest.approx(expected.flips, rel=1e-9)
    assert result.perplexity.base == pytest.approx(expected.base_perplexity, rel=1e-5)
    assert result.perplexity.compressed == pytest.approx(expected.perplexity, rel=1e-5)
    ratio = expected.perplexity / expected.base_perplexity
    assert result.perplexity.ratio.value == pytest.approx(ratio, rel=1e-5)
    assert result.perplexity.ratio.low < ratio < result.perplexity.ratio.high


@pytest.mark.parametrize("noise", [0.3, 1.0, 10.0])
def test_all_figures_match_the_reference(noise):
    base, ours, ids = logits(0, noise)
    result = measure(base, ours, ids)
    assert_matches(result, base, ours, ids)
    assert result.n_tokens == DOCUMENTS * (LENGTH - 1)
    assert 0 < result.kl.ci95[0] < result.kl.value < result.kl.ci95[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits_are_compared_in_float32(dtype):
    base, ours, ids = logits(1)
    base, ours = base.to(dtype), ours.to(dtype)
    assert_matches(measure(base, ours, ids), base, ours, ids)


def test_large_logits_do_not_overflow():
    base, ours, ids = logits(2)
    base, ours = base + 3000, ours - 3000
    result = measure(base, ours, ids)
    expected = reference.divergence(base.numpy(), ours.numpy(), ids.numpy())
    assert result.kl.value == pytest.approx(expected.kl, rel=1e-3)


@pytest.mark.parametrize("batch", [1, 2, 4, 5])
def test_how_documents_are_batched_makes_no_difference(batch):
    base, ours, ids = logits(3)
    whole, parts = measure(base, ours, ids), measure(base, ours, ids, batch)
    assert parts.kl.value == pytest.approx(whole.kl.value, rel=1e-6)
    assert parts.kl.ci95 == pytest.approx(whole.kl.ci95, rel=1e-6)
    assert percentiles(parts) == pytest.approx(percentiles(whole), rel=1e-6)
    assert parts.top1_agreement == whole.top1_agreement
    assert parts.perplexity.compressed == pytest.approx(whole.perplexity.compressed, rel=1e-6)
    assert parts.perplexity.base == pytest.approx(whole.perplexity.base, rel=1e-6)
    assert parts.n_tokens == whole.n_tokens


def test_identical_models_do_not_diverge():
    base, _, ids = logits(4)
    result = measure(base, base.clone(), ids)
    assert (result.kl.value, *result.kl.ci95) == (0, 0, 0)
    assert percentiles(result) == (0, 0, 0, 0)
    assert result.flips.value == result.flips.high == 0
    assert result.perplexity.ratio.value == 1
    assert result.top1_agreement.value == result.top1_agreement.low == 1
    assert result.perplexity.compressed == result.perplexity.base


def test_a_shift_of_all_logits_is_no_divergence():
    base, _, ids = logits(5)
    result = measure(base, base + 7.5, ids)
    assert abs(result.kl.value) < 1e-6
    assert result.top1_agreement.value == 1
    assert result.perplexity.compressed == pytest.approx(result.perplexity.base, rel=1e-5)


def test_kl_is_of_the_base_with_respect_to_the_compressed_model():
    """Base (0.5, 0.5), compressed (0.9, 0.1): KL(base || compressed) is not KL(compressed || base)."""
    base = torch.zeros(1, 2, 2)
    ours = torch.tensor([0.9, 0.1]).log().expand(1, 2, 2)
    result = measure(base, ours, torch.zeros(1, 2, dtype=torch.long))
    assert result.kl.value == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))


def test_uniform_predictions_are_as_perplexed_as_the_vocabulary_is_large():
    uniform = torch.zeros(2, 5, 16)
    result = measure(uniform, uniform, torch.zeros(2, 5, dtype=torch.long))
    assert result.perplexity.compressed == pytest.approx(16)


def test_the_last_position_predicts_nothing():
    base, ours, ids = logits(6)
    other = ours.clone()
    other[:, -1] = 1000 * torch.randn(DOCUMENTS, VOCABULARY)
    assert measure(base, ours, ids) == measure(base, other, ids)


def test_the_first_token_is_not_predicted():
    base, ours, ids = logits(7)
    other = ids.clone()
    other[:, 0] = (other[:, 0] + 1) % VOCABULARY
    assert measure(base, ours, ids) == measure(base, ours, other)


def test_a_changed_token_moves_the_agreement_by_one_token():
    base, _, ids = logits(8)
    ours = base.clone()
    ours[2, 3, int((base[2, 3].argmax() + 1) % VOCABULARY)] = 100
    result = measure(base, ours, ids)
    assert result.top1_agreement.value == pytest.approx(1 - 1 / (DOCUMENTS * (LENGTH - 1)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_predictions_that_are_not_finite_are_refused(bad):
    base, ours, ids = logits(9)
    ours[1, 2, 3] = bad
    with pytest.raises(NumericalError, match="not finite"):
        measure(base, ours, ids)


def test_logits_are_not_changed():
    base, ours, ids = logits(10)
    copies = base.clone(), ours.clone()
    measure(base, ours, ids)
    assert torch.equal(base, copies[0])
    assert torch.equal(ours, copies[1])


def test_percentile_is_over_tokens_not_documents():
    """All divergence in one token of 60: the 99th percentile interpolates towards it."""
    base, _, ids = logits(11)
    ours = base.clone()
    ours[0, 0] = base[0, 0].flip(0) * 2
    result = measure(base, ours, ids)
    top = result.kl.value * DOCUMENTS * (LENGTH - 1)
    rank = 0.99 * (DOCUMENTS * (LENGTH - 1) - 1)
    assert result.kl.p99 == pytest.approx(top * (rank - np.floor(rank)), rel=1e-4)
    assert sum(result.kl.histogram.counts) == result.n_tokens
