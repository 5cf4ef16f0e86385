"""Checkpoints that llm-compressor writes: measured as transformers runs them."""

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams

from srcr.data.tokens import Tokens
from srcr.errors import InputError
from srcr.formats import load
from srcr.models.checkpoint import open_model
from srcr.pipelines.compress import compress
from srcr.pipelines.evaluate import evaluate
from srcr.pipelines.options import RunOptions
from srcr.plans.plan import Recipe
from srcr.plans.specs import PruneSpec
from srcr.testing import tiny_model

IDS = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(0))
GROUP = {"type": "int", "strategy": "group", "group_size": 16, "dynamic": False}
CHANNEL = {"type": "int", "strategy": "channel", "dynamic": False}
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
SCHEMES = {
    "W4A16": ({"num_bits": 4, "symmetric": True, **GROUP}, None),
    "W4A16_ASYM": ({"num_bits": 4, "symmetric": False, **GROUP}, None),
    "W8A16_ASYM": ({"num_bits": 8, "symmetric": False, **CHANNEL}, None),
    "W8A8": ({"num_bits": 8, "symmetric": True, **CHANNEL}, TOKEN),
}


def quantized(folder, scheme):
    """A tiny Llama rounded to nearest by a scheme, as llm-compressor saves it; and what it was."""
    weights, activations = SCHEMES[scheme]
    model = tiny_model("llama")
    model.save_pretrained(folder / "base")
    group = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights),
        input_activations=None if activations is None else QuantizationArgs(**activations),
    )
    config = QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for module in model.modules():
        if not getattr(module, "quantization_scheme", None) or not hasattr(module, "weight_scale"):
            continue
        args = module.quantization_scheme.weights
        columns = args.group_size or module.weight.shape[1]
        W = module.weight.data.view(len(module.weight), -1, columns)
        scale, zero_point = calculate_qparams(W.amin(-1), W.amax(-1), args)
        module.weight_scale.data.copy_(scale.view_as(module.weight_scale))
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero_point.view_as(module.weight_zero_point))
        module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder / "other")
    compressor.update_config(folder / "other")
    return folder / "base", folder / "other"


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_is_loaded_and_measured(scheme, tmp_path):
    base, other = quantized(tmp_path, scheme)
    before = (other / "config.json").read_bytes()
    logits = load(other)(IDS, use_cache=False).logits
    expected = open_model(base).loaded()(IDS, use_cache=False).logits
    error = float((logits - expected).norm() / expected.norm())
    assert 0 < error < (0.35 if "W4" in scheme else 0.03)
    (result,) = evaluate(str(base), [str(other)], Tokens.of(IDS), options=RunOptions(quiet=True))
    assert result.rates.bits == (4 if "W4" in scheme else 8)
    assert 0 < result.divergence.kl.value < 0.2
    assert (other / "config.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_its_weights_are_compressed_without_its_quantizers(scheme, tmp_path):
    _, other = quantized(tmp_path, scheme)
    recipe = Recipe(PruneSpec("magnitude", 0.25))
    with pytest.raises(InputError, match="compressed already"):
        compress(str(other), tmp_path / "o", recipe, Tokens.of(IDS), RunOptions(quiet=True))
    options = RunOptions(quiet=True, allow_requantize=True)
    record = compress(str(other), tmp_path / "o", recipe, Tokens.of(IDS), options)
    assert record.format == "dense"
    assert any("is quantized already" in note for note in record.notes)
    weights = load(tmp_path / "o").state_dict()
    dequantized = load(other).state_dict()
    for layer in record.layers:
        kept = weights[f"{layer.name}.weight"] != 0
        assert int(kept.sum()) <= 0.75 * kept.numel()
        original = dequantized[f"{layer.name}.weight"]
        assert torch.equal(weights[f"{layer.name}.weight"][kept], original[kept])


@torch.no_grad()
def test_activations_are_quantized_where_the_model_is_measured_and_not_where_it_is_compressed(
    tmp_path,
):
    _, other = quantized(tmp_path, "W8A8")
    served, plain = load(other), open_model(other).loaded()
    ours, theirs = served.state_dict(), plain.state_dict()
    assert set(ours) >= set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    linear = served.model.layers[0].mlp.up_proj
    x = torch.linspace(-1, 1, linear.in_features)[None] ** 3
    step = float(x.abs().max()) / 127.5
    rounded = (x / step).round().clamp(-128, 127) * step
    torch.testing.assert_close(linear(x), rounded @ linear.weight.T)
    torch.testing.assert_close(plain.model.layers[0].mlp.up_proj(x), x @ linear.weight.T)
