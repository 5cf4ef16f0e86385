"""Folders that people have: each is loaded everywhere, or refused everywhere in one line with what to do."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from srcr.errors import InputError
from srcr.formats import load
from srcr.models.checkpoint import open_model
from srcr.models.companions import READ_PATTERNS
from srcr.models.load import load_model
from srcr.storage.index import LFS_POINTER
from srcr.testing import save_tiny_model

WEIGHTS = "model.safetensors"
POINTER = LFS_POINTER.decode() + f"\noid sha256:{'0' * 64}\nsize 1044992\n"
#: The files of a folder, and what is said of it.
NOT_A_MODEL = {
    "empty": ({}, "the folder is empty"),
    "adapter": (
        {"adapter_config.json": "{}", "adapter_model.safetensors": ""},
        "adapter.*merge it",
    ),
    "diffusers": ({"model_index.json": "{}"}, "diffusers pipeline"),
    "sentences": ({"modules.json": "[]"}, "sentence-transformers"),
    "gguf": ({"model-Q4_K_M.gguf": ""}, "GGUF file: give the original"),
    "mistral": ({"params.json": "{}", "consolidated.safetensors": ""}, "consolidated format"),
    "meta": ({"params.json": "{}", "consolidated.00.pth": ""}, "consolidated format"),
    "pickle": ({"pytorch_model.bin": ""}, "pickle files.*save_pretrained"),
    "checkpoint": ({"model.pt": ""}, "pickle files.*save_pretrained"),
    "onnx": ({"onnx/model.onnx": ""}, "ONNX files"),
    "tensorflow": ({"tf_model.h5": ""}, "TensorFlow"),
    "flax": ({"flax_model.msgpack": ""}, "Flax"),
    "notes": ({"notes.txt": ""}, "give the folder of a Hugging Face model"),
}


@pytest.fixture
def folder(tmp_path):
    return save_tiny_model(tmp_path / "model", "llama")


def refusals(folder):
    """What opening and loading a folder say, in one line each."""
    messages = []
    for opening in (open_model, load_model, load):
        with pytest.raises(InputError) as error:
            opening(folder)
        messages.append(str(error.value))
    assert not any("\n" in message for message in messages)
    return messages


@pytest.mark.parametrize("kind", NOT_A_MODEL)
@pytest.mark.parametrize("config", [False, True], ids=["bare", "with a config"])
def test_what_a_folder_holds_instead_is_said(kind, config, tmp_path, folder):
    files, message = NOT_A_MODEL[kind]
    other = tmp_path / "other"
    other.mkdir()
    if config:
        if not files:
            pytest.skip("not empty any more")
        shutil.copy(folder / "config.json", other)
    for name, text in files.items():
        (other / name).parent.mkdir(exist_ok=True)
        (other / name).write_text(text)
    assert all(re.search(message, refusal) for refusal in refusals(other))


def test_a_model_beside_its_adapter_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    assert all("merge it into the weights" in message for message in refusals(folder))


@pytest.mark.parametrize("dropped", [["model_type"], ["model_type", "architectures"]])
def test_a_config_without_a_model_type(folder, dropped):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if key not in dropped})
    )
    assert all("has no model_type" in message for message in refusals(folder))


LFS_FILES = sorted(
    {re.sub(r"\[.(.)\]", r"\1", pattern).replace("*", "x") for pattern in READ_PATTERNS}
    | {"config.json", "tokenizer.json", "model.safetensors.index.json", "srcr.json", WEIGHTS}
)


@pytest.mark.parametrize("name", LFS_FILES)
def test_git_lfs_pointers_are_named_whatever_file_they_stand_for(name, folder):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(POINTER)
    with pytest.raises(InputError, match=rf"{Path(name).name} is a Git LFS pointer.*git lfs pull"):
        open_model(folder)


@torch.no_grad()
@pytest.mark.parametrize("names", [["weights"], ["model-1", "model-2"]], ids=["one", "two"])
def test_weights_under_other_names_are_loaded_as_well(folder, names):
    """As they are where an index was lost; files of other formats beside them are not read."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    for i, name in enumerate(names):
        part = dict(list(tensors.items())[i :: len(names)])
        save_file(part, folder / f"{name}.safetensors", metadata={"format": "pt"})
    save_file(tensors, folder / "consolidated.safetensors")
    for state in (load(folder).state_dict(), open_model(folder).loaded().state_dict()):
        assert set(state) == set(tensors)
        assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


def test_a_shard_that_is_missing_without_an_index(folder):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    part = dict(list(tensors.items())[::2])
    save_file(part, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    assert all("lacks" in message for message in refusals(folder))
