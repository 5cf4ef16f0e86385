"""Theoretical rates and counted zeros."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from srcr.errors import InputError
from srcr.metrics.rates import (
    LayerRates,
    compressed_rates,
    count_zeros,
    entropy_bits,
    layer_tcr,
    mask_sparsity,
    mean_rates,
    measured_rates,
)
from srcr.models.checkpoint import open_model
from srcr.numerics.compressed import CompressedWeight
from srcr.numerics.grid import Grid
from srcr.pipelines.candidates import open_candidates
from srcr.records.run import LayerRecord, LoadedBytes
from srcr.storage.index import file_bytes
from srcr.testing import save_tiny_model, tiny_model

layers = st.lists(
    st.tuples(st.integers(1, 10**9), st.floats(0, 0.999), st.integers(2, 16)),
    min_size=1,
    max_size=8,
)


@pytest.mark.parametrize(
    ("sparsity", "bits", "expected"),
    [(0, 16, 0), (0.25, 4, 0.8125), (0, 3, 0.8125), (0.5, 16, 0.5), (0, 4, 0.75), (0.5, 2, 0.9375)],
)
def test_tcr_of_a_layer(sparsity, bits, expected):
    assert layer_tcr(sparsity, bits) == expected


@given(sparsity=st.floats(0, 0.999), bits=st.integers(2, 15))
def test_tcr_is_a_fraction_that_grows_with_either_half(sparsity, bits):
    rate = layer_tcr(sparsity, bits)
    assert 0 <= rate < 1
    assert rate > layer_tcr(sparsity, bits + 1)
    assert layer_tcr(sparsity + 0.0005, bits) > rate


@given(layers)
def test_a_model_lies_between_its_layers(rows):
    sparsity, bits, tcr = mean_rates(iter(rows))
    for mean, values in (
        (sparsity, [s for _, s, _ in rows]),
        (bits, [q for _, _, q in rows]),
        (tcr, [layer_tcr(s, q) for _, s, q in rows]),
    ):
        assert min(values) - 1e-9 <= mean <= max(values) + 1e-9


def test_layers_weigh_by_their_parameters():
    rates = mean_rates([(300, 0.5, 4), (100, 0.0, 16)])
    assert rates == pytest.approx((0.375, 7.0, 0.75 * 0.875))


def test_layers_compressed_apart_are_not_the_product_of_the_means():
    sparsity, bits, tcr = mean_rates([(1, 0.5, 16), (1, 0.0, 8)])
    assert tcr == pytest.approx(0.5)
    assert layer_tcr(sparsity, bits) != pytest.approx(tcr)


def test_zeros_are_counted_over_all_weights():
    weights = [torch.tensor([[0.0, 1], [-0.0, 2]]), torch.ones(2, 6)]
    assert count_zeros(iter(weights)) == 2 / 16
    assert count_zeros([torch.zeros(3, dtype=torch.bfloat16)]) == 1


def test_compressed_rates_count_masks_and_files(tmp_path):
    """A layer pruned and quantized, a layer quantized, and the others left alone."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:, ::4] = 0
    opened = open_model(model)
    save_file({"w": torch.zeros(16)}, tmp_path / "model.safetensors")
    shapes = opened.topology.shapes
    first, second, *others = shapes
    layers = [
        LayerRecord(first, shapes[first], 3 / 8, 4, 0.0, 0.5, 2.0, 0.0),
        LayerRecord(second, shapes[second], 0.0, 4, 0.0, 0.25, 3.0, 0.0),
    ]
    rates = compressed_rates(opened, opened, layers, tmp_path, LoadedBytes(123, "engine"))
    size = {name: rows * cols for name, (rows, cols) in shapes.items()}
    total, rest = sum(size.values()), sum(size[name] for name in others)
    a, b = size[first], size[second]
    zeros = size["model.layers.1.mlp.up_proj"] / 4
    assert rates.sparsity == pytest.approx(a * 3 / 8 / total)
    assert rates.bits == pytest.approx((a * 4 + b * 4 + rest * 16) / total)
    assert rates.tcr == pytest.approx((a * (1 - 5 / 8 / 4) + b * 0.75) / total)
    assert rates.zeros == pytest.approx((a * 0.5 + b * 0.25 + zeros) / total)
    assert rates.entropy_bits == pytest.approx((a * 2 + b * 3 + rest * 16) / total)
    assert (rates.loaded_bytes, rates.engine) == (123, "engine")
    assert rates.base_bytes == opened.weight_bytes
    assert rates.stored_bytes == file_bytes(tmp_path)


def test_measured_rates_count_what_is_gone_as_sparsity():
    layers = [LayerRates(50, 0.0, 4, 0.3, 2.0), LayerRates(30, 0.5, 16, 0.5, 9.0)]
    rates = measured_rates(layers, 100, 10, 5, LoadedBytes(5, "vllm"))
    assert rates.sparsity == pytest.approx(1 - 65 / 100)
    assert rates.tcr == pytest.approx(1 - (50 * 4 + 15 * 16) / 1600)
    assert rates.bits == pytest.approx((50 * 4 + 30 * 16) / 80)
    assert rates.zeros == pytest.approx((15 + 15) / 80)
    assert rates.entropy_bits == pytest.approx((50 * 2 + 30 * 9) / 100)
    unknown = [*layers, LayerRates(20, 0.0, 8, 0.0, None)]
    assert measured_rates(unknown, 100, 10, 5, LoadedBytes(5, "vllm")).entropy_bits is None


def test_file_bytes_counts_weight_files_only(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"12345")
    (tmp_path / "y.json").write_bytes(b"123")
    assert file_bytes(tmp_path) == 5


def test_entropy_of_a_model_counts_layers_by_their_parameters():
    codes = torch.zeros(2, 8, dtype=torch.int8)
    codes[:, ::2] = 1
    grid = Grid(torch.ones(2, 1), None, 4, 8, torch.float32)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[:, :4] = False
    assert entropy_bits(CompressedWeight(None, 0.0, codes=codes, grid=grid)) == pytest.approx(1)
    assert mask_sparsity(CompressedWeight(None, 0.0, codes=codes, grid=grid)) == 0
    pruned = CompressedWeight(mask, 0.0, values=torch.randn(2, 8) * mask)
    assert mask_sparsity(pruned) == 0.5
    assert entropy_bits(pruned) == pytest.approx(1 + 8)


@pytest.mark.parametrize("method", ["compressed-tensors", "gptq"])
def test_what_other_libraries_quantized(tmp_path, method):
    """Whole bytes in place of packed codes: the bits are known, their entropy is not. Other libraries'
    checkpoints are refused rather than counted as 16 bits."""
    base = open_model(save_tiny_model(tmp_path / "base", "llama"))
    folder = save_tiny_model(tmp_path / "quantized", "llama")
    config = json.loads((folder / "config.json").read_text())
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    config["quantization_config"] = {
        "quant_method": method, "format": "int-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip
    if method == "gptq":
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match="gptq"):
            open_candidates(base, [folder], torch.device("cpu"))
    else:
        tensors = load_file(folder / "model.safetensors")
        for name in base.topology.linears():
            weight = tensors[f"{name}.weight"]
            scale = weight.abs().amax(1, keepdim=True) / 127
            tensors[f"{name}.weight"] = (weight / scale).round().to(torch.int8)
            tensors[f"{name}.weight_scale"] = scale
            tensors[f"{name}.weight_zero_point"] = torch.zeros_like(scale, dtype=torch.int8)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        _, (candidate,) = open_candidates(base, [folder], torch.device("cpu"))
        assert (candidate.rates.bits, candidate.rates.entropy_bits) == (8, None)
        assert candidate.rates.source == "config and weights"
