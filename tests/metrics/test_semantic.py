"""Semantic consistency: greedy continuations against transformers' own, scores against their meaning."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from srcr import bundled
from srcr.data.tokens import Tokens
from srcr.errors import InputError, NumericalError
from srcr.formats import load
from srcr.metrics import consistency, embeddings, semantic
from srcr.metrics.continuations import END, continue_greedily, stop_tokens
from srcr.metrics.embeddings import Scorer, embed_texts, load_scorer
from srcr.metrics.specs import SemanticSpec
from srcr.models.checkpoint import open_model
from srcr.models.load import load_tokenizer
from srcr.serialize import to_dict
from srcr.testing import tiny_model

N = 24


def prompts(n=N, length=6, vocabulary=96, seed=0):
    ids = torch.randint(3, vocabulary, (n, length), generator=torch.Generator().manual_seed(seed))
    return Tokens(ids, "random ids", "")


def letters(texts):
    """A toy embedder: how often each letter occurs."""
    counts = torch.tensor([[float(text.count(c)) for c in "abcdefgh "] for text in texts])
    return torch.nn.functional.normalize(counts, dim=-1)


def reference(texts, embed=letters):
    scorer = Scorer("letters", embed)
    tokens = Tokens(torch.arange(2 * len(texts)).view(-1, 2), "numbers", "")
    vectors = embed_texts(scorer, texts)
    return semantic.Reference(tokens, 8, (), None, scorer, tuple(texts), vectors)


def generate(model, ids, new, stop):
    """transformers' own greedy search, END from the first end token on."""
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new,
        eos_token_id=list(stop) or None, pad_token_id=0,
    )[:, ids.shape[1] :]  # fmt: skip
    ended = torch.isin(out, torch.tensor(stop, dtype=torch.long)).long().cumsum(1) > 0
    full = torch.full((len(ids), new), END)
    full[:, : out.shape[1]] = torch.where(ended, END, out)
    return full


@pytest.fixture(scope="module")
def bundled_model():
    model = load("bundled", torch.float32)
    return model, load_tokenizer(bundled.model_path())


@pytest.fixture(scope="module")
def bundled_reference(bundled_model):
    model, tokenizer = bundled_model
    spec = SemanticSpec(n=16, prompt_len=8, max_new_tokens=8, scorer="base")
    tokens = semantic.load_prompts(spec, "bundled", open_model("bundled"))
    return semantic.prepare(model, tokenizer, tokens, spec)


# Continuations


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_continuations_are_those_of_transformers(family):
    model, ids = tiny_model(family), prompts().input_ids
    free = continue_greedily(model, ids, 20, ())
    assert torch.equal(free, generate(model, ids, 20, ()))
    stop = free[::8, 5].tolist()  # tokens that do occur
    ended = continue_greedily(model, ids, 20, stop)
    assert torch.equal(ended, generate(model, ids, 20, stop))
    assert bool((ended == END).any())


def test_continuations_are_those_of_transformers_on_the_bundled_model(bundled_model):
    model, _ = bundled_model
    spec = SemanticSpec(n=12, prompt_len=10, max_new_tokens=24)
    ids = semantic.load_prompts(spec, "bundled", open_model("bundled")).input_ids
    assert ids.shape == (12, 10)
    stop = stop_tokens(model)
    assert torch.equal(continue_greedily(model, ids, 24, stop), generate(model, ids, 24, stop))


def test_continuations_are_those_of_transformers_on_a_real_model(stories):
    model = load(stories, torch.float32)
    spec = SemanticSpec(n=16, prompt_len=16, max_new_tokens=24)
    ids = semantic.load_prompts(spec, "self", open_model(model)).input_ids
    stop = stop_tokens(model)
    assert torch.equal(continue_greedily(model, ids, 24, stop), generate(model, ids, 24, stop))


def test_how_prompts_are_batched_makes_no_difference():
    model, ids = tiny_model("llama"), prompts().input_ids
    seen = []
    whole = continue_greedily(model, ids, 10, (5,))
    parts = continue_greedily(model, ids, 10, (5,), lambda done, _: seen.append(done), 7)
    assert torch.equal(whole, parts)
    assert seen == [7, 14, 21, 24]


def test_sixteen_bit_models_write_in_float32_and_are_left_as_they_were():
    model = tiny_model("llama", torch.bfloat16)
    ids = prompts().input_ids
    wide = tiny_model("llama", torch.bfloat16).float()
    assert torch.equal(continue_greedily(model, ids, 6, ()), continue_greedily(wide, ids, 6, ()))
    assert model.dtype == torch.bfloat16


def test_the_context_is_never_exceeded():
    model = tiny_model("gpt2")  # 64 positions
    ids = prompts(2, 40).input_ids
    assert continue_greedily(model, ids, 24, ()).shape == (2, 24)
    with pytest.raises(InputError, match="context of 64: ask for at most 24"):
        continue_greedily(model, ids, 25, ())


def test_predictions_that_are_not_finite_stop():
    model = tiny_model("llama")
    model.lm_head.weight.data[:] = torch.nan
    with pytest.raises(NumericalError, match="not finite"):
        continue_greedily(model, prompts(2).input_ids, 2, ())


def test_a_text_ends_where_the_generation_config_says():
    model = tiny_model("llama")
    assert stop_tokens(model) == (2,)
    model.generation_config.eos_token_id = [7, 9]
    assert stop_tokens(model) == (7, 9)
    model.generation_config.eos_token_id = None
    assert stop_tokens(model) == (2,)
    model.config.eos_token_id = None
    assert stop_tokens(model) == ()


def test_a_candidate_is_ended_by_the_tokens_of_the_base():
    base, candidate = tiny_model("llama"), tiny_model("llama")
    base.generation_config.eos_token_id = [5, 17, 40]
    tokens = prompts()
    spec = SemanticSpec(n=N, prompt_len=6, max_new_tokens=12)
    ref = semantic.prepare(base, None, tokens, spec)
    assert semantic.continue_prompts(ref, candidate) == list(ref.texts)
    assert any(len(text.split()) < 12 for text in ref.texts)


# Scores


def test_the_same_model_is_wholly_consistent(bundled_model, bundled_reference):
    texts = semantic.continue_prompts(bundled_reference, bundled_model[0])
    result = semantic.semantic_consistency(bundled_reference, texts)
    assert (result.consistency, *result.ci95) == (1, 1, 1)
    assert (result.normalised, *result.normalised_ci95) == (1, 1, 1)
    assert result.exact == 1
    assert result.chance < 1
    assert {pair.similarity for pair in result.worst} == {1}
    assert (result.n, result.prompt_len, result.max_new_tokens) == (16, 8, 8)
    assert all(pair.prompt for pair in result.worst)


def test_another_model_is_at_chance_level():
    base, other = tiny_model("llama"), tiny_model("llama", seed=1)
    spec = SemanticSpec(n=100, prompt_len=6, max_new_tokens=8, scorer=None)
    ref = semantic.prepare(base, None, prompts(100), spec)
    result = semantic.semantic_consistency(ref, semantic.continue_prompts(ref, other))
    assert "hidden states of the base" in result.scorer
    assert result.exact < 0.1
    assert abs(result.normalised) < 0.15
    assert result.normalised_ci95[0] <= 0.05


def test_noise_lowers_it_step_by_step(bundled_model, bundled_reference):
    results = []
    for noise in (0.0, 0.1, 1.0):
        model = load("bundled", torch.float32)
        generator = torch.Generator().manual_seed(0)
        for block in model.model.layers:
            for weight in (block.mlp.down_proj.weight, block.self_attn.o_proj.weight):
                shift = torch.randn(weight.shape, generator=generator)
                weight.data += noise * weight.std() * shift
        texts = semantic.continue_prompts(bundled_reference, model)
        results.append(semantic.semantic_consistency(bundled_reference, texts))
    values = [result.normalised for result in results]
    assert values[0] == 1
    assert values[0] >= values[1] > values[2]
    assert results[1].exact > results[2].exact


@given(st.integers(2, 12), st.integers(0, 1000))
def test_the_figures_are_those_of_the_whole_matrix_of_cosines(n, seed):
    rng = np.random.default_rng(seed)
    base, ours = rng.standard_normal((2, n, 5)) + 0.5
    base, ours = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (base, ours))
    cosines = base @ ours.T
    off = cosines[~np.eye(n, dtype=bool)].mean()
    value, chance, normalised = consistency.consistency_estimates(np.diag(cosines), base, ours)
    assert value.value == pytest.approx(np.diag(cosines).mean())
    assert chance == pytest.approx(off)
    assert normalised.value == pytest.approx((np.diag(cosines).mean() - off) / (1 - off))
    assert -1 <= value.low <= value.high <= 1
    assert np.isfinite([normalised.low, normalised.high]).all()
    assert normalised.high <= 1 + 1e-9


@given(st.lists(st.integers(0, 4), min_size=2, max_size=8))
def test_a_prompt_drawn_twice_is_not_its_own_chance(draw):
    rng = np.random.default_rng(0)
    base, ours = rng.standard_normal((2, 5, 3))
    counts = consistency.draw_counts(np.array(draw), 5)
    pairs = [base[i] @ ours[j] for i in draw for j in draw if i != j]
    level = consistency.chance_level(counts, base, ours)
    assert level == pytest.approx(np.mean(pairs)) if pairs else np.isnan(level)


def test_the_order_of_the_prompts_makes_no_difference():
    rng = np.random.default_rng(0)
    texts = [["".join(rng.choice(list("abcdefgh "), 9)) for _ in range(30)] for _ in range(2)]
    order = rng.permutation(30)
    base, ours = texts
    plain = semantic.semantic_consistency(reference(base), ours)
    moved = semantic.semantic_consistency(
        reference([base[i] for i in order]), [ours[i] for i in order]
    )
    assert moved.consistency == pytest.approx(plain.consistency)
    assert moved.chance == pytest.approx(plain.chance)
    assert moved.normalised == pytest.approx(plain.normalised)
    assert [p.similarity for p in moved.worst] == pytest.approx([p.similarity for p in plain.worst])


def test_empty_texts_are_like_each_other_and_like_nothing_else():
    ref = reference(["", "", "abc", "abc", "  "])
    result = semantic.semantic_consistency(ref, ["", "abc", "", "abc", ""])
    similarities = [(pair.base, pair.compressed, pair.similarity) for pair in result.worst]
    assert sorted(similarities) == [
        ("", "", 1), ("", "abc", 0), ("  ", "", 1), ("abc", "", 0), ("abc", "abc", 1),
    ]  # fmt: skip
    assert result.exact == pytest.approx(0.4)


def test_texts_that_are_all_alike_have_no_normalised_value():
    for texts in (["abc"] * 4, [""] * 4):
        result = semantic.semantic_consistency(reference(texts), texts)
        assert result.consistency == 1
        assert result.chance == pytest.approx(1)
        assert result.normalised is None
        assert to_dict(result)["normalised"] is None


def test_the_worst_prompts_come_first_with_both_texts():
    base = [f"{'a' * (i + 1)} b" for i in range(14)]
    ours = [text if i % 2 else "hhh" for i, text in enumerate(base)]
    result = semantic.semantic_consistency(reference(base), ours)
    assert len(result.worst) == 10
    values = [pair.similarity for pair in result.worst]
    assert values == sorted(values)
    first = result.worst[0]
    assert (first.prompt, first.compressed) == ("0 1", "hhh")
    assert {pair.compressed for pair in result.worst[:7]} == {"hhh"}
    assert result.exact == 0.5


def test_the_json_has_the_keys_of_the_design():
    result = semantic.semantic_consistency(reference(["a b", "c d", "e"]), ["a", "d", "e"])
    data = to_dict(result)
    assert set(data) == {
        "consistency", "ci95", "chance", "normalised", "normalised_ci95", "scorer", "n",
        "prompt_len", "max_new_tokens", "exact", "worst", "source",
    }  # fmt: skip
    assert set(data["worst"][0]) == {"prompt", "base", "compressed", "similarity"}
    assert data["ci95"] == list(result.ci95)


@pytest.mark.parametrize("texts", [["a"], ["a", "b", "c"]])
def test_a_text_for_each_prompt(texts):
    with pytest.raises(InputError, match="continuations for 2 prompts"):
        semantic.semantic_consistency(reference(["a", "b"]), texts)


def test_embeddings_that_are_not_finite_are_refused():
    with pytest.raises(NumericalError, match="letters"):
        reference(["a", "b"], lambda texts: torch.full((len(texts), 3), torch.nan))


@pytest.mark.parametrize("wrong", [{"n": 1}, {"prompt_len": 1}, {"max_new_tokens": 0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(InputError, match=str(next(iter(wrong.values())))):
        SemanticSpec(**wrong)


def test_rows_shorter_than_a_prompt_are_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "rows.safetensors"
    save_file({"input_ids": prompts(5, 6).input_ids}, path)
    model = open_model(tiny_model("llama"))
    tokens = semantic.load_prompts(SemanticSpec(prompt_len=4), str(path), model)
    assert tokens.input_ids.shape == (5, 4)
    with pytest.raises(InputError, match="set prompt_len to 6"):
        semantic.load_prompts(SemanticSpec(prompt_len=8), str(path), model)


# Scorers


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_hidden_states_of_ids_do_not_depend_on_the_company_they_are_in(family):
    scorer = load_scorer("base", tiny_model(family), None)
    texts = ["4 8 15", "16 23 42 4 8", "7"]
    together = scorer.embed(texts)
    assert torch.allclose(together.norm(dim=1), torch.ones(3))
    alone = torch.cat([scorer.embed([text]) for text in texts])
    assert torch.allclose(together, alone, atol=1e-5)


def test_a_scorer_that_reads_text_needs_a_tokenizer():
    with pytest.raises(InputError, match="no tokenizer: use 'base'"):
        load_scorer("some/model", tiny_model("llama"), None)


def test_what_is_not_installed_is_named(bundled_model, monkeypatch):
    for package in ("sentence_transformers", embeddings.DEFAULT_PACKAGE):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r"pip install 'srcr\[semantic\]'"):
        load_scorer("some/model", *bundled_model)
    assert load_scorer(None, *bundled_model).name.startswith("hidden states of the base")


def test_the_default_scorer_knows_what_sentences_mean(bundled_model):
    pytest.importorskip(embeddings.DEFAULT_PACKAGE)
    scorer = load_scorer(None, *bundled_model)
    assert scorer.name == "all-MiniLM-L6-v2"
    same, alike, unlike = scorer.embed(
        ["The cat sat on the mat.", "A cat is sitting on a rug.", "Interest rates rose in March."]
    )
    assert same.norm() == pytest.approx(1, abs=1e-5)
    assert float(same @ alike) > 0.6
    assert float(same @ unlike) < 0.15


@pytest.mark.slow
def test_sentence_transformers_gives_the_same_vectors(bundled_model):
    package = pytest.importorskip(embeddings.DEFAULT_PACKAGE)
    pytest.importorskip("sentence_transformers")
    texts = ["The cat sat on the mat.", "Once upon a time", "x"]
    ours = load_scorer(None, *bundled_model).embed(texts)
    theirs = load_scorer(str(package.get_model_path()), *bundled_model).embed(texts)
    assert torch.allclose(ours, theirs.cpu(), atol=1e-5)


def test_a_scorer_of_ones_own_is_welcome(bundled_reference):
    ref = replace(bundled_reference, scorer=Scorer("letters", letters))
    ref = replace(ref, embeddings=embed_texts(ref.scorer, ref.texts))
    assert semantic.semantic_consistency(ref, list(ref.texts)).consistency == 1
