"""Divergence and perplexity over rows: of differing length, and against a plain loop of transformers."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from srcr.data.specs import EvaluationText
from srcr.data.tokens import Tokens
from srcr.errors import InputError
from srcr.metrics import divergence
from srcr.metrics.divergence import DivergenceAccumulator, measure_divergence
from srcr.metrics.semantic import load_prompts
from srcr.metrics.specs import SemanticSpec
from srcr.models.checkpoint import open_model
from srcr.pipelines.evaluate import evaluate
from srcr.pipelines.options import RunOptions
from srcr.testing import tiny_model

LENGTHS = (9, 4, 17, 9, 2, 30, 4, 11)
QUIET = RunOptions(quiet=True)


def rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 96, (n,), generator=generator) for n in LENGTHS]


def padded(left):
    ids, mask = torch.full((len(LENGTHS), 33), 2), torch.zeros(len(LENGTHS), 33, dtype=torch.int64)
    for number, row in enumerate(rows()):
        place = slice(33 - len(row), None) if left else slice(len(row))
        ids[number, place], mask[number, place] = row, 1
    return Tokens.of(ids, "padded", mask)


@torch.no_grad()
def one_by_one(base, model):
    """The divergence of each row alone, in the order of the rows."""
    accumulator = DivergenceAccumulator()
    for row in rows():
        accumulator.add(base(row[None]).logits, model(row[None]).logits, row[None])
    return accumulator.result()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
def test_rows_of_differing_length_count_as_each_alone(family, monkeypatch):
    """Positions are absolute in GPT-2 and OPT, so that padding on the left would move them."""
    base, model = tiny_model(family), tiny_model(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    expected = one_by_one(base, model)
    assert expected.n_tokens == sum(LENGTHS) - len(LENGTHS)
    for tokens in (padded(left=True), padded(left=False), Tokens.of([r.tolist() for r in rows()])):
        (result,) = measure_divergence(base, [model], tokens)
        assert result.n_tokens == expected.n_tokens
        assert result.kl.value == pytest.approx(expected.kl.value, rel=1e-5)
        assert result.kl.ci95 == pytest.approx(expected.kl.ci95, rel=1e-5)
        assert result.perplexity.base == pytest.approx(expected.perplexity.base, rel=1e-6)
        assert result.perplexity.ratio.ci95 == pytest.approx(
            expected.perplexity.ratio.ci95, rel=1e-5
        )
        assert result.flips.ci95 == expected.flips.ci95
    monkeypatch.setattr(divergence, "BATCH_TOKENS", 1)  # however rows are batched
    (again,) = measure_divergence(base, [model], padded(left=True))
    assert again.kl.ci95 == pytest.approx(expected.kl.ci95, rel=1e-5)


def test_an_evaluation_is_the_same_however_it_is_padded():
    base, other = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        other.lm_head.weight.mul_(1.1)
    results = [evaluate(base, [other], padded(left), options=QUIET)[0] for left in (True, False)]
    assert results[0].divergence == results[1].divergence
    assert results[0].text == results[1].text
    assert results[0].text.size == "8 x up to 30 tokens"
    assert results[0].text.tokens == sum(LENGTHS)


@torch.no_grad()
def test_perplexity_is_that_of_a_plain_loop(stories, stories_text):
    """Rows of BOS and what follows in the text, each scored from its second token on."""
    tokenizer = AutoTokenizer.from_pretrained(stories)
    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    n, length = 32, 128
    text = tokenizer(stories_text.read_text(encoding="utf-8"), add_special_tokens=False)[
        "input_ids"
    ]
    total = 0.0
    for start in range(0, n * (length - 1), length - 1):
        row = torch.tensor([[tokenizer.bos_token_id, *text[start : start + length - 1]]])
        logits = model(row).logits
        total += float(cross_entropy(logits[0, :-1], row[0, 1:], reduction="sum"))
    expected = math.exp(total / (n * (length - 1)))
    (result,) = evaluate(
        stories, [stories], EvaluationText(str(stories_text), n, length), options=QUIET
    )
    assert result.divergence.perplexity.base == pytest.approx(expected, rel=1e-4)
    assert result.text.prefix == (tokenizer.bos_token_id,)
    assert result.text.tokens == n * length


def test_prompts_are_the_first_tokens_of_rows_that_are_as_long():
    opened, spec = open_model(tiny_model("llama")), SemanticSpec(n=3, prompt_len=9)
    expected = [row[:9].tolist() for row in rows() if len(row) >= 9][:3]
    for source in (padded(left=True), [row.tolist() for row in rows()]):
        assert load_prompts(spec, source, opened).input_ids.tolist() == expected
    with pytest.raises(InputError, match="has one row of 20 tokens"):
        load_prompts(SemanticSpec(n=3, prompt_len=20), padded(left=True), opened)
    with pytest.raises(InputError, match="prompts of 40 tokens were asked for"):
        load_prompts(SemanticSpec(n=3, prompt_len=40), padded(left=True), opened)
