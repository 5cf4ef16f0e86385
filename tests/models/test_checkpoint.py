"""A model opened: from a folder, in memory, or under an overlay; nothing is read before it is needed."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from srcr.errors import InputError
from srcr.models.checkpoint import load_from, open_model
from srcr.models.matrices import MatrixRef, read_matrix, replace_matrix
from srcr.models.transformed import TransformedSource
from srcr.testing import FAMILIES, save_tiny_model, tiny_model

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    return save_tiny_model(tmp_path / "model", "llama")


def ids():
    return torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model(ids(), use_cache=False).logits


def test_a_folder_a_model_and_a_pair(folder, stories):
    model = tiny_model("llama")
    for opened in (open_model(folder), open_model(str(folder)), open_model(model)):
        assert open_model(opened) is opened
        assert opened.architecture == "LlamaForCausalLM"
        assert opened.vocabulary == 96
        assert opened.parameters == sum(p.numel() for p in model.parameters())
        assert opened.tokenizer is None
    assert open_model(folder).name == str(folder)
    assert open_model(folder).topology == open_model(model).topology
    tokenizer = AutoTokenizer.from_pretrained(stories)
    pair = open_model((AutoModelForCausalLM.from_pretrained(stories), tokenizer))
    assert pair.tokenizer is tokenizer
    assert open_model(stories).tokenizer.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("thing", [3, None, {"a": 1}, torch.nn.Linear(2, 2)])
def test_what_is_no_model(thing):
    with pytest.raises(InputError, match=f"a model of type {type(thing).__name__} is not known"):
        open_model(thing)


def test_weights_that_are_not_there_as_they_are_refused(tmp_path):
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(tiny_model("llama").config)
    with pytest.raises(InputError, match="weights without data"):
        open_model(empty)


def test_opening_reads_nothing_but_headers(folder):
    """With garbage in place of every number the model opens: its parts and shapes are known."""
    expected = open_model(folder).topology
    path = folder / WEIGHTS
    size = sum(t.nbytes for t in load_file(path).values())
    data = path.read_bytes()
    path.write_bytes(data[:-size] + b"\xff" * size)  # NaN everywhere
    opened = open_model(folder)
    assert opened.topology == expected
    assert opened.topology.couplings == expected.couplings
    with pytest.raises(InputError, match="non-finite"):
        assert opened.sha256


def test_the_hash_is_that_of_the_files(folder):
    expected = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    assert open_model(folder).sha256 == expected


def test_a_model_in_memory_is_hashed_by_its_weights():
    first, again, other = (open_model(tiny_model("llama", seed=seed)) for seed in (0, 0, 1))
    assert first.sha256 == again.sha256 != other.sha256


def test_the_whole_model_is_loaded_once_while_it_is_held(folder):
    opened = open_model(folder)
    held = opened.loaded(torch.float32)
    assert opened.loaded(torch.float32) is held
    assert opened.loaded() is held
    own = open_model(model := tiny_model("llama"))
    assert own.loaded() is own.blockwise.model
    weight = model.get_input_embeddings().weight
    assert own.loaded().get_input_embeddings().weight is weight  # no second copy
    assert own.loaded(torch.bfloat16).dtype == torch.bfloat16
    assert model.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_an_overlay_shows_other_tensors_to_everyone(family, tmp_path):
    opened = open_model(save_tiny_model(tmp_path / "model", family))
    name = next(iter(opened.topology.matrices.values())).parameter
    overlay = opened.transformed(
        TransformedSource(opened.source, {name: lambda read: 2 * read(name)})
    )
    assert torch.equal(overlay.blockwise.tensor(name), 2 * opened.blockwise.tensor(name))
    whole = load_from(overlay.source)
    assert torch.equal(whole.get_parameter(name), 2 * opened.blockwise.tensor(name))
    assert not torch.equal(logits(whole), logits(opened.loaded()))
    block = overlay.blockwise.block(0)
    key = name.removeprefix(f"{overlay.topology.blocks[0].name}.")
    assert torch.equal(block.get_parameter(key), 2 * opened.blockwise.tensor(name))
    assert overlay.sha256 != opened.sha256


def test_an_overlay_may_change_shapes_with_the_config(folder):
    """The same model with half of its FFN channels."""
    opened = open_model(folder)
    halves = {}
    for linear in opened.topology.linears():
        name = opened.topology.matrices[linear].parameter
        if "gate_proj" in linear or "up_proj" in linear:
            halves[name] = lambda read, name=name: read(name)[:24]
        elif "down_proj" in linear:
            halves[name] = lambda read, name=name: read(name)[:, :24]
    source = TransformedSource(opened.source, halves, config={"intermediate_size": 24})
    smaller = opened.transformed(source)
    assert smaller.topology.shapes["model.layers.0.mlp.up_proj"] == (24, 32)
    assert source.config_dict()["intermediate_size"] == 24
    assert logits(load_from(source)).shape == (2, 20, 96)
    with pytest.raises(InputError, match="do not fit their config"):
        opened.transformed(TransformedSource(opened.source, halves))


def test_what_an_overlay_removes_is_gone(folder):
    source = TransformedSource(open_model(folder).source, {}, removed=["model.norm.weight"])
    assert "model.norm.weight" not in source.names()
    with pytest.raises(InputError, match="was removed"):
        source.get("model.norm.weight")


def test_companions_travel_with_a_folder_and_with_a_tokenizer(stories, tmp_path):
    (tmp_path / "from folder").mkdir()
    open_model(stories).save_companions(tmp_path / "from folder")
    names = {path.name for path in (tmp_path / "from folder").iterdir()}
    assert {"tokenizer.json", "generation_config.json"} <= names
    assert not any(name.endswith((".safetensors", "config.json")) for name in names - {
        "generation_config.json", "tokenizer_config.json"})  # fmt: skip
    (tmp_path / "from memory").mkdir()
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(stories),
        AutoTokenizer.from_pretrained(stories),
    )
    open_model((model, tokenizer)).save_companions(tmp_path / "from memory")
    assert (tmp_path / "from memory" / "tokenizer.json").is_file()


def test_a_matrix_is_read_and_replaced_wherever_it_lies():
    module = torch.nn.Module()
    module.plain = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    module.turned = torch.nn.Parameter(torch.arange(6.0).view(3, 2))
    module.stack = torch.nn.Parameter(torch.arange(24.0).view(4, 2, 3))
    for ref in (
        MatrixRef("block.plain"),
        MatrixRef("block.turned", transposed=True),
        MatrixRef("block.stack", index=2),
    ):
        before = read_matrix(module, ref, "block").clone()
        assert before.shape == (2, 3)
        old = module._parameters[ref.parameter.removeprefix("block.")]
        kept = old.detach().clone()
        replace_matrix(module, ref, -before, "block")
        assert torch.equal(read_matrix(module, ref, "block"), -before)
        assert torch.equal(old, kept), "whoever else holds the parameter sees no change"
    assert torch.equal(module.stack[[0, 1, 3]], torch.arange(24.0).view(4, 2, 3)[[0, 1, 3]])


def test_a_tied_head_is_stored_once_and_read_twice(tmp_path):
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    head = tensors.pop("model.embed_tokens.weight")
    save_file(tensors | {"lm_head.weight": head}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    opened = open_model(tmp_path)
    assert torch.equal(opened.blockwise.tensor("model.embed_tokens.weight"), head)
