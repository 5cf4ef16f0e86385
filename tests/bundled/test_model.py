"""The stored model: its files, its tokenizer, and how well it does on the tasks."""

import json
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from srcr.bundled import TASKS, Item, model_path, score, tasks, texts
from srcr.bundled.scoring import log_likelihoods


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path(), local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(
        model_path(), local_files_only=True, dtype=torch.float32
    )


def test_folder_is_small_and_complete():
    files = {path.name: path.stat().st_size for path in model_path().iterdir()}
    assert sum(files.values()) <= 8_000_000
    assert {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "training.json",
    } == set(files)  # fmt: skip


def test_weights_are_bfloat16_and_of_the_promised_shape():
    model = AutoModelForCausalLM.from_pretrained(model_path(), local_files_only=True)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert 2.0e6 <= sum(weight.numel() for weight in model.parameters()) <= 3.9e6
    for block in model.model.layers:
        for module in block.modules():
            if isinstance(module, torch.nn.Linear):
                assert module.in_features % 128 == 0
    config = model.config
    assert config.model_type == "llama"
    assert config.tie_word_embeddings
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.max_position_embeddings == 512
    assert model.generation_config.eos_token_id == config.eos_token_id


def test_tokenizer_frames_and_restores_documents(tokenizer):
    assert len(tokenizer) == 1024
    for text in texts(200, seed=3):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    strange = "Grüße, 世界!\n\t  ok"
    ids = tokenizer(strange)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == strange
    tokens = tokenizer.tokenize("1234 and 56")
    assert all(sum(letter.isdigit() for letter in token) <= 1 for token in tokens)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_tokens_split_between_prompt_and_choice(tokenizer, name):
    for item in tasks()[name]:
        prompt = tokenizer(item.prompt)["input_ids"]
        for choice in item.choices:
            tail = tokenizer(choice, add_special_tokens=False)["input_ids"]
            assert tokenizer(item.prompt + choice)["input_ids"] == prompt + tail


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_accuracy(model, tokenizer, name):
    items = Random(0).sample(tasks()[name], 200)
    assert sum(score(model, tokenizer, items)) >= 0.9 * len(items)


def test_figures_of_the_training():
    figures = json.loads((model_path() / "training.json").read_text())
    by_bits = figures["accuracy_by_bits"]
    for name in TASKS:
        assert by_bits["16"][name] >= 0.9
        assert by_bits["16"][name] > by_bits["3"][name] > by_bits["2"][name]


def test_figures_in_the_guide_are_those_of_the_training():
    guide = (Path(__file__).parents[2] / "docs" / "bundled.md").read_text()
    figures = json.loads((model_path() / "training.json").read_text())
    for bits, accuracies in figures["accuracy_by_bits"].items():
        assert (
            "| " + " | ".join([bits, *(f"{accuracies[name]:.3f}" for name in TASKS)]) + " |"
            in guide
        )
    assert f"{figures['parameters']:,}" in guide
    assert f"{figures['steps']:,} steps" in guide


def test_batches_do_not_change_likelihoods(model, tokenizer):
    items = [items[i] for items in tasks().values() for i in (0, 300)]
    alone = [log_likelihoods(model, tokenizer, [item])[0] for item in items]
    for single, others in zip(alone, log_likelihoods(model, tokenizer, items), strict=True):
        assert single == pytest.approx(others, abs=1e-3)


@pytest.fixture(scope="module")
def mamba(tokenizer):
    """A model whose cache is of another kind."""
    config = AutoConfig.for_model(
        "mamba", vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, state_size=8
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", ["model", "mamba"])
def test_likelihood_is_that_of_the_choice_alone(kind, tokenizer, request):
    model = request.getfixturevalue(kind)
    item = Item("Ana and Ben", (" went to the river.", " sat."), 0)
    for choice, total in zip(
        item.choices, log_likelihoods(model, tokenizer, [item])[0], strict=True
    ):
        ids = tokenizer(item.prompt + choice, return_tensors="pt")["input_ids"]
        start = len(tokenizer(item.prompt)["input_ids"])
        with torch.no_grad():
            chances = model(input_ids=ids).logits[0].log_softmax(-1)
        expected = sum(chances[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1]))
        assert total == pytest.approx(expected, abs=1e-3)
