"""Logits in pieces are the logits, and what is computed of them is the same."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from architectures import tiny_architecture
from srcr.data.tokens import Tokens
from srcr.metrics import divergence, predictions
from srcr.metrics.divergence import measure_divergence, plan_passes
from srcr.metrics.predictions import has_pieces, predict
from srcr.testing import tiny_model

#: Bodies and heads of several kinds: tied, with a bias, recurrent, logits that are scaled or bounded.
KINDS = ["llama", "gpt2", "cohere", "mamba", "rwkv"]


def ids(rows=3, length=12):
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(0))


def bounded():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Gemma2Config(vocab_size=96, final_logit_softcapping=0.05, **sizes, **heads)
    return Gemma2ForCausalLM(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", [*KINDS, "bounded"])
def test_pieces_are_the_logits_of_the_whole_row(kind):
    model = bounded() if kind == "bounded" else tiny_architecture(kind)
    assert has_pieces(model, ids())
    predictions = predict(model, ids())
    pieces = [predictions.logits(start, start + 5) for start in (0, 5, 10)]
    whole = model(ids(), use_cache=False).logits
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(ids(), use_cache=False).logits, whole)  # the model is as it was


@torch.no_grad()
def test_a_head_that_sees_its_neighbours_is_found_out():
    model = tiny_model("llama")
    head = model.lm_head.forward
    model.lm_head.forward = lambda hidden: head(hidden).cumsum(1)
    assert not has_pieces(model, ids())
    whole = model(ids(), use_cache=False).logits
    assert torch.equal(predict(model, ids(), in_pieces=False).logits(2, 7), whole[:, 2:7])


@pytest.mark.parametrize("pieces", [True, False])
def test_the_size_of_pieces_makes_no_difference(pieces, monkeypatch):
    base, model = tiny_model("llama"), tiny_architecture("llama")
    tokens = Tokens.of(ids(5, 20))
    monkeypatch.setattr(divergence, "has_pieces", lambda *_: pieces)
    (expected,) = measure_divergence(base, [model], tokens)
    monkeypatch.setattr(predictions, "PIECE_LOGITS", 96 * 7)
    monkeypatch.setattr(divergence, "WHOLE_LOGITS", 96 * 2 * 40)
    assert len(plan_passes([base, model], tokens).batches) == (1 if pieces else 3)
    (result,) = measure_divergence(base, [model], tokens)
    assert result.kl.value == pytest.approx(expected.kl.value, rel=1e-5)
    assert result.kl.p99 == pytest.approx(expected.kl.p99, rel=1e-4)
    assert result.perplexity.base == pytest.approx(expected.perplexity.base, rel=1e-5)
    assert result.n_tokens == expected.n_tokens == 5 * 19
