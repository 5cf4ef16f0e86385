"""An empty model, filled from its files while it runs, is the model that transformers loads."""

import pytest
import torch

from srcr.models.checkpoint import open_model
from srcr.models.load import load_model
from srcr.models.observe import observe
from srcr.models.source import CheckpointSource
from srcr.models.streaming import SourceTensors, empty_model, filled
from srcr.testing import FAMILIES, save_tiny_model, tiny_model

#: transformers renames GPT-NeoX's head between file and model.
RENAMED = "gpt_neox"
STREAMED = [family for family in FAMILIES if family != RENAMED]


def token_ids():
    return torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", STREAMED)
def test_it_gives_the_same_logits_and_holds_nothing(tmp_path, family, dtype):
    folder = save_tiny_model(tmp_path / "model", family, dtype)
    whole = load_model(folder)
    source = CheckpointSource(folder)
    model = empty_model(source)
    tensors = SourceTensors(source, model)
    assert tensors.fits(model)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    with filled(model, tensors):
        logits = model(token_ids(), use_cache=False).logits
        assert observe(model) == observe(whole)
    assert torch.equal(logits, whole(token_ids(), use_cache=False).logits)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert not any(module._forward_hooks for module in model.modules())


@torch.no_grad()
def test_a_run_that_fails_lets_go_of_the_weights(tmp_path):
    folder = save_tiny_model(tmp_path / "model", "llama")
    source = CheckpointSource(folder)
    model = empty_model(source)
    with pytest.raises(IndexError), filled(model, SourceTensors(source, model)):
        model(torch.tensor([[10**6]]), use_cache=False)
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_opens_streamed_or_loaded(tmp_path, family):
    folder = save_tiny_model(tmp_path / "model", family, torch.bfloat16)
    opened = open_model(folder)
    blocks = opened.blockwise
    assert blocks.in_memory == (family == RENAMED)
    whole = load_model(folder)
    assert opened.topology == observe(whole)
    assert opened.dtype == torch.bfloat16
    for name in blocks.names():
        assert torch.equal(blocks.tensor(name), whole.state_dict()[name])
    block = blocks.block(1)
    expected = whole.get_submodule(opened.topology.blocks[1].name)
    for name, parameter in expected.named_parameters():
        assert torch.equal(block.get_parameter(name).float(), parameter.float())


def test_shards_and_tied_weights(tmp_path):
    model = tiny_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    blocks = open_model(tmp_path).blockwise
    assert not blocks.in_memory
    assert blocks.topology.tied
    assert "lm_head.weight" not in blocks.names()
    assert torch.equal(blocks.tensors.get("lm_head.weight"), model.lm_head.weight)
