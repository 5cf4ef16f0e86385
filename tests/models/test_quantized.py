"""Checkpoints that other tools have quantized: loaded, or refused in one line with what to do."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from srcr.data.tokens import Tokens
from srcr.errors import InputError
from srcr.formats import load
from srcr.models.checkpoint import open_model
from srcr.models.load import load_model
from srcr.pipelines.evaluate import evaluate
from srcr.pipelines.options import RunOptions
from srcr.testing import save_tiny_model

IDS = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(0))
#: Methods whose package is not installed, or that nothing knows, as their tools write them.
METHODS = {
    "gptq": {"bits": 4, "group_size": 128, "desc_act": True, "sym": True},
    "awq": {"bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "hqq": {"quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}},
    "quanto": {"weights": "int4"},
    "aqlm": {"in_group_size": 8, "nbits_per_codebook": 16},
    "modelopt": {"quant_algo": "NVFP4"},
    "exl2": {"bits": 4.5},
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}


@pytest.fixture
def folder(tmp_path):
    return save_tiny_model(tmp_path / "model", "llama")


def declare(folder, quantization):
    """Say in config.json that the weights are quantized."""
    path = folder / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization})
    )


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_loaded_is_named_with_the_remedy(folder, method):
    declare(folder, {"quant_method": method, **METHODS[method]})
    for opening in (load_model, load, open_model):
        with pytest.raises(InputError, match=rf"{method}.*original, unquantized model") as error:
            opening(folder)
        assert "\n" not in str(error.value)


def test_a_method_without_a_name(folder):
    declare(folder, {"bits": 4})
    with pytest.raises(InputError, match=r"unnamed method.*original, unquantized model"):
        load_model(folder)


def test_several_schemes_with_zero_points(folder):
    """transformers would dequantize all of them by the first."""
    weights = {"type": "int", "strategy": "channel", "symmetric": False}
    groups = {
        f"group_{bits}": {"targets": [f"re:.*{bits}"], "weights": {"num_bits": bits, **weights}}
        for bits in (4, 8)
    }
    declare(
        folder,
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups},
    )
    with pytest.raises(InputError, match="several schemes"):
        load_model(folder)


def in_float8(folder, block=8):
    """Store the linears of the blocks in float8 with a scale for each square, as DeepSeek does."""
    path, stored = folder / "model.safetensors", {}
    for name, weight in load_file(path).items():
        if not name.endswith("proj.weight"):
            stored[name] = weight
            continue
        rows, cols = weight.shape
        squares = weight.view(rows // block, block, cols // block, block)
        scale = squares.abs().amax((1, 3)) / 448
        codes = (squares / scale[:, None, :, None]).view(rows, cols).to(torch.float8_e4m3fn)
        stored |= {name: codes, f"{name}_scale_inv": scale}
    save_file(stored, path, metadata={"format": "pt"})
    declare(
        folder,
        {
            "quant_method": "fp8",
            "weight_block_size": [block, block],
            "activation_scheme": "dynamic",
        },
    )
    return folder


@torch.no_grad()
def test_float8_is_dequantized_and_rated_by_its_bytes(tmp_path):
    base = save_tiny_model(tmp_path / "base", "llama")
    other = in_float8(save_tiny_model(tmp_path / "other", "llama"))
    before = (other / "config.json").read_bytes()
    expected = load_model(base).state_dict()
    for name, weight in load_model(other).state_dict().items():
        assert (weight - expected[name]).norm() <= 0.04 * expected[name].norm()
    (result,) = evaluate(str(base), [str(other)], Tokens.of(IDS), options=RunOptions(quiet=True))
    assert (result.rates.bits, result.rates.sparsity) == (8, 0)
    assert result.rates.stored_bytes < result.rates.base_bytes
    assert 0 < result.divergence.kl.value < 0.1
    assert (other / "config.json").read_bytes() == before


def test_a_quantized_base_is_opened_with_its_dequantized_weights(tmp_path):
    opened = open_model(in_float8(save_tiny_model(tmp_path / "other", "llama")))
    assert opened.dtype == torch.float32
    assert "quantization_config" not in opened.source.config_dict()
