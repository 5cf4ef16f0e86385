"""Quantized embeddings: what the installed transformers loads of them, and that srcr loads all of them.

The table here is the one of docs/usage.md.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from srcr import load
from srcr.formats import get_format
from srcr.models.checkpoint import open_model
from srcr.plans.plan import Recipe
from srcr.plans.specs import QuantSpec
from srcr.storage.safetensors import TensorFiles
from srcr.testing import compressed_checkpoint, save_tiny_model

pytestmark = pytest.mark.slow

PACKED, DENSE = get_format("compressed-tensors"), get_format("dense")
IDS = torch.arange(12)[None]


def spec(bits, symmetric=True):
    return QuantSpec("rtn", bits, 16, symmetric)


def write(tmp_path, family, recipe, fmt=PACKED, **changes):
    """A checkpoint, the folder it was written into, and the logits that it stands for."""
    base = save_tiny_model(tmp_path / "base", family, torch.bfloat16, **changes)
    checkpoint = compressed_checkpoint(base, recipe)
    fmt.check(checkpoint.contents)
    (tmp_path / "out").mkdir()
    fmt.write(checkpoint, tmp_path / "out")
    with torch.no_grad():
        return checkpoint, tmp_path / "out", checkpoint.dequantized()(IDS, use_cache=False).logits


@torch.no_grad()
def transformers_logits(folder):
    """What stock transformers gives; None where it cannot load the folder."""
    try:
        return AutoModelForCausalLM.from_pretrained(folder)(IDS, use_cache=False).logits
    except (AttributeError, RuntimeError):
        return None


TABLE = [
    # family, changes of the config, bits of the linears, of the embeddings, ignored, transformers loads it
    ("llama", {"tie_word_embeddings": True}, 4, 8, (), False),
    ("llama", {"tie_word_embeddings": True}, 4, 4, (), True),
    ("llama", {"tie_word_embeddings": True}, 16, 8, (), True),
    ("llama", {"tie_word_embeddings": False}, 4, 8, (), False),
    ("llama", {"tie_word_embeddings": False}, 4, 4, (), True),
    ("llama", {"tie_word_embeddings": False}, 4, 8, ("model.embed_tokens",), True),
    ("llama", {"tie_word_embeddings": False}, 4, 8, ("lm_head",), False),
    ("gemma3", {}, 4, 8, (), False),
    ("gemma3", {}, 4, 4, (), True),
    ("opt", {}, 4, 8, (), False),
    ("gpt_neox", {}, 4, 8, ("gpt_neox.embed_in",), True),
]


@pytest.mark.parametrize(("family", "changes", "bits", "embeddings", "ignored", "loads"), TABLE)
def test_what_transformers_loads(tmp_path, family, changes, bits, embeddings, ignored, loads):
    quant = None if bits == 16 else spec(bits)
    recipe = Recipe(None, quant, ignore=ignored, embeddings=spec(embeddings))
    checkpoint, out, expected = write(tmp_path, family, recipe, **changes)
    assert PACKED.loader(checkpoint.contents) == ("transformers" if loads else "srcr")
    assert any("transformers does not" in x for x in PACKED.notes(checkpoint.contents)) != loads
    with torch.no_grad():
        assert torch.equal(load(out)(IDS, use_cache=False).logits, expected)
    logits = transformers_logits(out)
    assert (logits is not None) == loads
    assert logits is None or torch.equal(logits, expected)


def test_zero_points_where_all_have_the_same(tmp_path):
    recipe = Recipe(None, spec(4, False), embeddings=spec(4, False))
    checkpoint, out, expected = write(tmp_path, "gemma3", recipe)
    assert torch.equal(transformers_logits(out), expected)
    assert not checkpoint.contents.schemes["model.embed_tokens"].symmetric


@pytest.mark.parametrize("fmt", [PACKED, DENSE], ids=lambda fmt: fmt.name)
def test_a_tied_embedding_is_one_copy_that_reads_back(tmp_path, fmt):
    recipe = Recipe(None, spec(4), embeddings=spec(8))
    checkpoint, out, _ = write(tmp_path, "gemma3", recipe, fmt)
    name = "model.embed_tokens"
    files = TensorFiles(out)
    assert not [key for key in files.entries if key.startswith("lm_head")]
    assert (f"{name}.weight_packed" in files) == (fmt is PACKED)
    written = fmt.read(out)
    assert torch.equal(written.weight(name), checkpoint.weight(name))
    if fmt is PACKED:
        assert written.contents.schemes == checkpoint.contents.schemes
        assert torch.equal(written.read(name).codes, checkpoint.read(name).codes)
    model = load(out)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert open_model(out).topology.tied


@pytest.mark.parametrize(
    ("tied", "bits", "engine"),
    [(False, 8, "vllm"), (True, 8, "srcr"), (True, 4, "transformers")],
)
def test_who_serves_them(tmp_path, tied, bits, engine):
    """vLLM has kernels for packed embeddings and heads, but not for one that is both."""
    recipe = Recipe(None, spec(4), embeddings=spec(bits))
    _, out, _ = write(tmp_path, "llama", recipe, tie_word_embeddings=tied)
    loaded = PACKED.loaded_bytes(out, PACKED.read(out).contents)
    assert loaded.engine == engine
    stored = sum(TensorFiles(out).sizes().values())
    assert (loaded.n_bytes == stored) == (engine == "vllm")


def test_fused_linears_that_differ_are_said_aloud(tmp_path):
    recipe = Recipe(None, spec(4), ignore=("*.k_proj",))
    checkpoint, out, expected = write(tmp_path, "llama", recipe)
    assert "vLLM fuses model.layers.0.self_attn.q_proj" in PACKED.notes(checkpoint.contents)[0]
    assert PACKED.loaded_bytes(out, PACKED.read(out).contents).engine == "transformers"
    assert torch.equal(transformers_logits(out), expected)
