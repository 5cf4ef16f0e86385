"""Codes, scales and zero-points through pack-quantized files and back."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from srcr.formats import compressed_tensors, dense
from srcr.numerics.grid import Grid
from srcr.types import CompressedWeight, CompressionPlan, LayerPlan, QuantSpec

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def random_weight(rows, groups, group_size, bits, symmetric, dtype, seed):
    """Any codes on any grid, the smallest and the largest code among them."""
    generator = torch.Generator().manual_seed(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    cols = groups * group_size
    codes = torch.randint(low, high + 1, (rows, cols), generator=generator).to(torch.int8)
    codes.view(-1)[0], codes.view(-1)[-1] = low, high
    scale = (torch.randn(rows, groups, generator=generator) * 0.05).to(dtype).float()
    zero = None
    if not symmetric:
        zero = torch.randint(low, high + 1, (rows, groups), generator=generator).float()
    return CompressedWeight(None, 0.0, codes, Grid(scale, zero, bits, group_size, dtype))


def layer_config(name, bits):
    groups = {"group_0": {"targets": [name], "weights": {"num_bits": bits}}}
    return {"quantization_config": {"config_groups": groups}}


def write(folder, tensors, config):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


@settings(max_examples=120)
@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 5),
    group_size=st.integers(1, 37),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    dtype=DTYPES,
    seed=st.integers(0, 1000),
)
def test_any_shape_and_width_comes_back(rows, groups, group_size, bits, symmetric, dtype, seed):
    weight = random_weight(rows, groups, group_size, bits, symmetric, dtype, seed)
    tensors = compressed_tensors.tensors("a.b", weight, dtype, False)
    packed = tensors["a.b.weight_packed"]
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, -(-groups * group_size * bits // 32))  # no gaps between codes
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), tensors, layer_config("a.b", bits))
        ((found, values, codes),) = compressed_tensors.read(Path(name), ["a.b"], frozenset())
    assert found == "a.b"
    assert torch.equal(codes, weight.codes)
    assert torch.equal(values, weight.dequantize())


@settings(max_examples=20)
@given(rows=st.integers(1, 9), cols=st.integers(1, 9), transposed=st.booleans(), dtype=DTYPES)
def test_dense_weights_come_back(rows, cols, transposed, dtype):
    values = torch.randn(rows, cols).to(dtype)
    weight = CompressedWeight(None, 0.0, values=values)
    tensors = dense.tensors("a", weight, dtype, transposed)
    assert tensors["a.weight"].shape == ((cols, rows) if transposed else (rows, cols))
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), tensors, {})
        read = dense.read(Path(name), ["a"], frozenset({"a"} if transposed else ()))
        ((_, found, codes),) = read
    assert codes is None
    assert torch.equal(found, values.float())


@pytest.mark.parametrize(
    ("bits", "symmetric", "engine"),
    [(4, True, "vllm"), (3, True, "vllm"), (4, False, "vllm"), (8, False, "vllm"),
     (3, False, "transformers"), (2, False, "transformers")],
)  # fmt: skip
def test_loaded_bytes_are_those_of_the_engine(tmp_path, bits, symmetric, engine):
    rows, cols = 24, 40
    weight = random_weight(rows, 1, cols, bits, symmetric, torch.bfloat16, 0)
    tensors = compressed_tensors.tensors("a", weight, torch.bfloat16, False)
    tensors["embed.weight"] = torch.zeros(96, 40, dtype=torch.bfloat16)
    config = layer_config("a", bits)
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = symmetric
    write(tmp_path, tensors, config)
    loaded = compressed_tensors.loaded_bytes(tmp_path)
    assert loaded.engine == engine
    words = 4 * rows * -(-cols * bits // 32)
    zeros = 0 if symmetric else 4 * -(-rows * bits // 32)
    packed = words + zeros + 2 * rows + 2 * 8  # codes, zero-points, scales, shape
    expected = packed if engine == "vllm" else rows * cols * 2
    assert loaded.n_bytes == expected + 96 * 40 * 2


def test_loaded_bytes_of_a_dense_checkpoint(tmp_path):
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7).half()}, tmp_path / "model.safetensors")
    assert dense.loaded_bytes(tmp_path).n_bytes == 3 * 5 * 4 + 7 * 2


def test_num_bits_follows_targets():
    groups = {
        "group_0": {"targets": ["re:.*mlp.*"], "weights": {"num_bits": 3}},
        "group_1": {"targets": ["model.layers.0.self_attn.q_proj"], "weights": {"num_bits": 5}},
    }
    config = {"quantization_config": {"config_groups": groups, "ignore": ["re:.*layers\\.1.*"]}}
    assert compressed_tensors.num_bits(config, "model.layers.0.mlp.up_proj") == 3
    assert compressed_tensors.num_bits(config, "model.layers.0.self_attn.q_proj") == 5
    assert compressed_tensors.num_bits(config, "model.layers.0.self_attn.k_proj") == 16
    assert compressed_tensors.num_bits(config, "model.layers.1.mlp.up_proj") == 16
    assert compressed_tensors.num_bits({}, "a") == 16
    everything = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}}
    config = {"quantization_config": {"config_groups": everything, "ignore": ["b"]}}
    assert compressed_tensors.num_bits(config, "a") == 4
    assert compressed_tensors.num_bits(config, "b") == 16


def test_one_config_group_for_each_setting():
    from srcr.models.topology import observe
    from srcr.testing import tiny_model

    topology = observe(tiny_model("llama"))
    o, down, other_o, *rest = (
        f"{block.name}.{unit.names[0]}"
        for block in topology.blocks
        for unit in block.units
        if len(unit.names) == 1
    )
    plan = CompressionPlan(
        (
            LayerPlan(o, None, QuantSpec("rtn", 3, -1)),
            LayerPlan(down, None, QuantSpec("gptq", 3, -1)),
            LayerPlan(other_o, None, QuantSpec("rtn", 3, 16)),
        )
    )
    compressed_tensors.check(plan, topology)
    config = compressed_tensors.quantization_config(plan, topology)
    groups = config["config_groups"].values()
    assert [group["targets"] for group in groups] == [[o, down], [other_o]]
    assert [group["weights"]["strategy"] for group in groups] == ["channel", "group"]
    untouched = set(topology.linears()) - {o, down, other_o}
    assert set(config["ignore"]) == untouched | {"lm_head"}
    assert set(rest) <= untouched
