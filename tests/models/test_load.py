"""From a name to a model, and every way in which that fails."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from srcr.data.tokens import context_length
from srcr.errors import InputError
from srcr.models.checkpoint import open_model
from srcr.models.config import check_causal
from srcr.models.load import load_model, load_tokenizer, resolve
from srcr.testing import FAMILIES, save_tiny_model, tiny_model

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    return save_tiny_model(tmp_path / "model", "llama")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_models_come_back_as_they_were(tmp_path, family, dtype):
    model = load_model(save_tiny_model(tmp_path / family, family, dtype))
    expected = tiny_model(family, dtype).state_dict()
    state = model.state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert context_length(model.config) == 64
    head = open_model(model).topology.head
    assert model.get_submodule(head) is model.get_output_embeddings()


def test_another_precision_can_be_asked_for(tmp_path):
    folder = save_tiny_model(tmp_path / "model", "llama", torch.bfloat16)
    assert {p.dtype for p in load_model(folder, torch.float32).parameters()} == {torch.float32}


def test_resolve_gives_folders_back(folder):
    assert resolve(folder) == folder
    assert resolve(str(folder)) == folder


@pytest.mark.parametrize("name", ["./nowhere", "nowhere", "a/b/c", "~/no/such/folder"])
def test_missing_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"does not exist.*give a folder"):
        resolve(name)


def test_absolute_missing_folder(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        resolve(tmp_path / "nowhere")


def test_file_instead_of_folder(folder):
    with pytest.raises(InputError, match=r"is a file: give the folder"):
        resolve(folder / WEIGHTS)


def test_hub_id_that_cannot_be_reached(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"'nobody/no-such-model' is neither a folder here nor"):
        resolve("nobody/no-such-model")


def test_no_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"has no config\.json"):
        load_model(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[1]", "not a JSON object"), ("\udcff", "not valid JSON")],
    ids=["cut", "list", "not-utf8"],
)
def test_broken_config(folder, text, message):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=message):
        load_model(folder)


@pytest.mark.parametrize(
    ("key", "value"), [("model_type", "no_such_type"), ("hidden_size", "wide"), ("hidden_size", 40)]
)
def test_config_that_does_not_fit(folder, key, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(InputError, match="cannot load"):
        load_model(folder)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_quantized_by_a_library_that_is_not_here(folder, method):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="cannot load"):
        load_model(folder)


@pytest.mark.parametrize(
    ("kind", "architecture"), [("bert", "BertModel"), ("t5", "T5Model"), ("vit", "ViTModel")]
)
def test_not_causal(tmp_path, kind, architecture):
    AutoConfig.for_model(kind, architectures=[architecture]).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=rf"not a causal language model.*{architecture}"):
        check_causal(tmp_path)


def test_not_causal_by_its_type_alone(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(InputError, match=r"not a causal language model.*'t5'"):
        check_causal(tmp_path)


def test_decoder_saved_without_its_head_is_not_causal(tmp_path):
    config = AutoConfig.from_pretrained(save_tiny_model(tmp_path / "whole", "llama"))
    AutoModel.from_config(config).save_pretrained(tmp_path / "bare")
    with pytest.raises(InputError, match="LlamaModel"):
        load_model(tmp_path / "bare")


def test_pickle_weights_are_not_read(folder):
    (folder / WEIGHTS).unlink()
    torch.save(tiny_model("llama").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no \*\.safetensors weights: it holds pickle files"):
        load_model(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(folder, keep):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    with pytest.raises(InputError, match=r"model\.safetensors is not a valid safetensors file"):
        load_model(folder)


def test_an_index_that_points_outside_the_folder(folder):
    (folder / WEIGHTS).rename(folder.parent / "other.safetensors")
    save_file({"a": torch.zeros(1)}, folder / "decoy.safetensors")
    names = load_file(folder.parent / "other.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../other.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"points outside its folder"):
        load_model(folder)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_missing_tensor(folder, name):
    """transformers would make it up at random."""
    tensors = load_file(folder / WEIGHTS)
    del tensors[name]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        load_model(folder)


def test_tensor_of_another_shape(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(8, 8)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(InputError, match="cannot load"):
        load_model(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_weight_that_is_not_finite(tmp_path, value, dtype):
    folder = save_tiny_model(tmp_path / "model", "llama", dtype)
    tensors = load_file(folder / WEIGHTS)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    fault = r"model\.layers\.1\.mlp\.up_proj\.weight holds 1 non-finite value "
    with pytest.raises(InputError, match=fault):
        assert open_model(folder).sha256
    with pytest.raises(InputError, match=fault):  # in memory as well
        assert open_model(load_model(folder)).sha256


def test_no_tokenizer_is_none(folder):
    assert load_tokenizer(folder) is None


def test_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot load the tokenizer"):
        load_tokenizer(folder)
