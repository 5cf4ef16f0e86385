"""inspect(): of checkpoints in every format."""

import pytest
import torch

import srcr
from srcr.data.tokens import Tokens
from srcr.pipelines.options import Output, RunOptions
from srcr.testing import save_tiny_model

QUIET = RunOptions(quiet=True)


@pytest.fixture
def ids():
    return Tokens.of(torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("fmt", ["gguf", "archive", "compressed-tensors"])
def test_a_compressed_checkpoint_is_seen_as_its_model(tmp_path, ids, fmt):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "head_dim": 32}
    base = save_tiny_model(tmp_path / "base", "llama", **sizes)
    quant = srcr.QuantSpec("rtn", 4)
    recipe = srcr.Recipe(quant=quant, embeddings=srcr.QuantSpec("rtn", 8))
    srcr.compress(base, Output(tmp_path / fmt, format=fmt), recipe, ids, QUIET)
    plain, packed = srcr.inspect(base), srcr.inspect(tmp_path / fmt)
    assert packed.blocks == plain.blocks
    assert packed.parameters == plain.parameters
    assert packed.output_head == plain.output_head
    assert (plain.quantized, packed.quantized) == (False, True)
    assert {each.bits for each in packed.embeddings} == {8}
    assert packed.base_bytes < plain.base_bytes
