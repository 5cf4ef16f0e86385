"""Theoretical rates and counted zeros."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from srcr.errors import InputError
from srcr.formats import Loaded
from srcr.metrics.rates import (
    count_zeros,
    entropy_bits,
    file_bytes,
    layer_tcr,
    mask_sparsity,
    mean_rates,
    measured_rates,
    planned_rates,
)
from srcr.models.topology import observe
from srcr.numerics.grid import Grid
from srcr.testing import tiny_model
from srcr.types import CompressedWeight, LayerRecord

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


def test_planned_rates_count_masks_and_files(tmp_path):
    """One layer of 8 pruned and quantized, one of 24 quantized, one of 32 left alone."""
    base, out = tmp_path / "base", tmp_path / "out"
    for folder, size in ((base, 64), (out, 16)):
        folder.mkdir()
        save_file({"w": torch.zeros(size)}, folder / "a.safetensors")
        save_file({"v": torch.zeros(size)}, folder / "b.safetensors")
        (folder / "config.json").write_text("{}" * 999)
    shapes = {"a": (2, 4), "b": (4, 6), "c": (4, 8)}
    pruned = LayerRecord("a", (2, 4), 3 / 8, 4, 0.0, 0.5, 2.0, 0.0)
    quantized = LayerRecord("b", (4, 6), 0.0, 4, 0.0, 0.25, 3.0, 0.0)
    rates = planned_rates(
        shapes, [pruned, quantized], {"c": 0.125}, base, out, Loaded(123, "engine")
    )
    assert rates.sparsity == pytest.approx(3 / 64)
    assert rates.bits == pytest.approx((8 * 4 + 24 * 4 + 32 * 16) / 64)
    assert rates.tcr == pytest.approx((8 * (1 - 5 / 8 / 4) + 24 * 0.75) / 64)
    assert rates.zeros == pytest.approx((8 * 0.5 + 24 * 0.25 + 32 * 0.125) / 64)
    assert rates.entropy_bits == pytest.approx((8 * 2 + 24 * 3 + 32 * 16) / 64)
    assert (rates.loaded_bytes, rates.engine) == (123, "engine")
    assert rates.base_bytes == sum(p.stat().st_size for p in base.glob("*.safetensors"))
    assert rates.stored_bytes == file_bytes(out) < rates.base_bytes


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
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    config["quantization_config"] = {
        "quant_method": method, "format": "int-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    topology = observe(model)
    parameters = sum(height * width for height, width in topology.shapes.values())
    if method == "gptq":
        with pytest.raises(InputError, match="quantized by 'gptq'"):
            measured_rates(tmp_path, tmp_path, model, topology, parameters)
        return
    rates = measured_rates(tmp_path, tmp_path, model, topology, parameters)
    assert (rates.bits, rates.entropy_bits) == (8, None)
