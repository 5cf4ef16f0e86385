"""Codes, scales and zero-points through pack-quantized files and back."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from srcr.errors import InputError
from srcr.formats import get_format
from srcr.formats.checkpoint import Checkpoint, Contents, Scheme, planned_contents
from srcr.formats.compressed_tensors import quantization_config, scheme_of
from srcr.models.checkpoint import open_model
from srcr.numerics.compressed import CompressedWeight
from srcr.numerics.grid import Grid
from srcr.plans.plan import CompressionPlan, LayerPlan
from srcr.plans.specs import QuantSpec
from srcr.storage.safetensors import TensorFiles
from srcr.testing import tiny_model

FORMAT = get_format("compressed-tensors")
NAME = "model.layers.0.mlp.down_proj"
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def random_weight(rows, groups, group_size, bits, symmetric, dtype, seed):
    """Any codes on any grid, the smallest and the largest code among them."""
    generator = torch.Generator().manual_seed(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    cols = groups * group_size
    codes = torch.randint(low, high + 1, (rows, cols), generator=generator).to(torch.int8)
    codes.view(-1)[0], codes.view(-1)[-1] = low, high
    scale = (torch.randn(rows, groups, generator=generator) * 0.05).to(dtype).float()
    zero_point = None
    if not symmetric:
        zero_point = torch.randint(low, high + 1, (rows, groups), generator=generator).float()
    return CompressedWeight(None, 0.0, codes, Grid(scale, zero_point, bits, group_size, dtype))


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    groups=st.integers(1, 5),
    group_size=st.integers(1, 37),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    dtype=DTYPES,
    seed=st.integers(0, 1000),
)
def test_any_width_comes_back(groups, group_size, bits, symmetric, dtype, seed):
    """In a model whose down-projection is as wide."""
    cols = groups * group_size
    opened = open_model(tiny_model("llama", dtype, intermediate_size=cols, num_hidden_layers=1))
    weight = random_weight(32, groups, group_size, bits, symmetric, dtype, seed)
    contents = Contents(
        opened.topology, opened.config, {NAME: Scheme(bits, group_size, symmetric)}, (NAME,)
    )
    with tempfile.TemporaryDirectory() as name:
        FORMAT.write(Checkpoint.of(opened, contents, lambda _: weight), Path(name))
        packed = TensorFiles(Path(name)).meta(f"{NAME}.weight_packed")
        assert packed.dtype == torch.int32
        assert packed.shape == (32, -(-cols * bits // 32))  # no gaps between codes
        written = FORMAT.read(Path(name))
        read = written.read(NAME)
    assert written.contents.schemes == contents.schemes
    assert torch.equal(read.codes, weight.codes)
    assert torch.equal(read.dequantize(), weight.dequantize())
    assert torch.equal(read.grid.scale, weight.grid.scale)


@pytest.mark.parametrize(
    ("bits", "symmetric", "engine"),
    [(4, True, "vllm"), (3, True, "vllm"), (4, False, "vllm"), (8, False, "vllm"),
     (3, False, "transformers"), (2, False, "transformers")],
)  # fmt: skip
def test_loaded_bytes_are_those_of_the_engine(tmp_path, bits, symmetric, engine):
    opened = open_model(tiny_model("llama", torch.bfloat16))
    rows, cols = opened.topology.shapes[NAME]
    weight = random_weight(rows, 1, cols, bits, symmetric, torch.bfloat16, 0)
    contents = Contents(
        opened.topology, opened.config, {NAME: Scheme(bits, -1, symmetric)}, (NAME,)
    )
    FORMAT.write(Checkpoint.of(opened, contents, lambda _: weight), tmp_path)
    loaded = FORMAT.loaded_bytes(tmp_path, contents)
    assert loaded.engine == engine
    words = 4 * rows * -(-cols * bits // 32)
    zero_points = 0 if symmetric else 4 * -(-rows * bits // 32)
    packed = words + zero_points + 2 * rows + 2 * 8  # codes, zero-points, scales, shape
    expected = packed if engine == "vllm" else rows * cols * 2
    assert loaded.n_bytes == expected + opened.weight_bytes - rows * cols * 2


def test_loaded_bytes_of_a_dense_checkpoint(tmp_path):
    opened = open_model(tiny_model("llama"))
    dense, checkpoint = get_format("dense"), Checkpoint.of(opened)
    dense.write(checkpoint, tmp_path)
    assert dense.loaded_bytes(tmp_path, checkpoint.contents).n_bytes == opened.weight_bytes


def test_schemes_follow_targets():
    groups = {
        "group_0": {"targets": ["re:.*mlp.*"], "weights": {"num_bits": 3}},
        "group_1": {
            "targets": ["model.layers.0.self_attn.q_proj"],
            "weights": {"num_bits": 5, "group_size": 16, "symmetric": False},
        },
    }
    config = {"config_groups": groups, "ignore": ["re:.*layers\\.1.*"]}
    assert scheme_of(config, "model.layers.0.mlp.up_proj") == Scheme(3, -1, True)
    assert scheme_of(config, "model.layers.0.self_attn.q_proj") == Scheme(5, 16, False)
    assert scheme_of(config, "model.layers.0.self_attn.k_proj").num_bits == 16
    assert scheme_of(config, "model.layers.1.mlp.up_proj").num_bits == 16
    assert scheme_of({}, "a").num_bits == 16
    everything = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}}
    config = {"config_groups": everything, "ignore": ["b"]}
    assert scheme_of(config, "a").num_bits == 4
    assert scheme_of(config, "b").num_bits == 16


def test_a_config_group_for_each_scheme():
    opened = open_model(tiny_model("llama"))
    topology = opened.topology
    singles = [group.names[0] for group in topology.groups() if len(group.names) == 1]
    o, down, other_o, *rest = singles
    plan = CompressionPlan(
        (
            LayerPlan(o, None, QuantSpec("rtn", 3, -1)),
            LayerPlan(down, None, QuantSpec("gptq", 3, -1)),
            LayerPlan(other_o, None, QuantSpec("rtn", 3, 16)),
        )
    )
    contents = planned_contents(plan, opened)
    FORMAT.check(contents)
    config = quantization_config(contents)
    groups = config["config_groups"].values()
    assert [group["targets"] for group in groups] == [[o, down], [other_o]]
    assert [group["weights"]["strategy"] for group in groups] == ["channel", "group"]
    untouched = set(topology.linears()) - {o, down, other_o}
    assert set(config["ignore"]) == untouched | {"lm_head"}
    assert set(rest) <= untouched


def test_weights_that_are_stored_in_another_way_are_named(tmp_path):
    """As other tools store them: the scheme is known, the codes are not."""
    opened = open_model(tiny_model("llama"))
    get_format("dense").write(Checkpoint.of(opened), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "naive-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8}}},
        "ignore": ["lm_head"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = FORMAT.read(tmp_path)
    assert checkpoint.contents.schemes[NAME].num_bits == 8
    with pytest.raises(InputError, match="in another way than pack-quantized"):
        checkpoint.read(NAME)
