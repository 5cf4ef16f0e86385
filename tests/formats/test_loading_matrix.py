"""The installed transformers loads what srcr writes, to the very bits srcr computed."""

import json
import re
from functools import cache

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from srcr.errors import InputError
from srcr.formats import get_format
from srcr.formats.checkpoint import planned_contents
from srcr.models.checkpoint import open_model
from srcr.models.matrices import read_matrix
from srcr.plans.plan import CompressionPlan, LayerPlan, Recipe
from srcr.plans.resolve import uniform_plan
from srcr.plans.specs import PruneSpec, QuantSpec
from srcr.testing import compressed_checkpoint, save_tiny_model, tiny_model

pytestmark = pytest.mark.slow

PACKED, DENSE = get_format("compressed-tensors"), get_format("dense")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
SYMMETRY = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of tiny models, saved once each."""

    @cache
    def folder(family, dtype=torch.float32):
        return save_tiny_model(tmp_path_factory.mktemp("base") / family, family, dtype)

    return folder


def write(base, out, plan, fmt=PACKED):
    """A checkpoint of the saved model ``base`` under ``plan``, and what it ought to hold."""
    checkpoint = compressed_checkpoint(base, plan)
    fmt.check(checkpoint.contents)
    out.mkdir()
    fmt.write(checkpoint, out)
    return {name: checkpoint.read(name) for name in checkpoint.contents.compressed}


def check(fmt, model, plan):
    """Whether the format can hold the plan."""
    fmt.check(planned_contents(plan, open_model(model)))


def assert_loads_exactly(out, compressed, dtype, base):
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        model(torch.arange(8)[None])  # compressed-tensors may decompress only now
    matrices = open_model(base).topology.matrices
    untouched = AutoModelForCausalLM.from_pretrained(base).state_dict()
    for name, weight in compressed.items():
        loaded = read_matrix(model, matrices[name])
        assert loaded.dtype == dtype
        assert torch.equal(loaded, weight.dequantize().to(dtype)), name
    compressed_names = {matrices[name].parameter for name in compressed}
    for name, tensor in untouched.items():
        if name not in compressed_names:
            assert torch.equal(model.state_dict()[name], tensor), name


def uniform(model, bits, group, symmetric=True, sparsity=0.0):
    prune = PruneSpec("magnitude", sparsity) if sparsity else None
    recipe = Recipe(prune, QuantSpec("rtn", bits, group, symmetric))
    return uniform_plan(open_model(model).topology.shapes, recipe)


def by_group(quant, prune=None):
    """A plan for the tiny Llama that treats each group (serving engines fuse them) in its own way."""
    groups = open_model(tiny_model("llama")).topology.groups()
    layers = [
        LayerPlan(name, prune, quant(i)) for i, group in enumerate(groups) for name in group.names
    ]
    return CompressionPlan(tuple(layers))


@pytest.mark.parametrize(
    ("bits", "dtype", "group"),
    [(bits, torch.float32, 16) for bits in range(2, 9)]  # per channel: the widths below
    + [(bits, torch.bfloat16, -1) for bits in (2, 3, 4, 8)],
    ids=lambda value: str(value).removeprefix("torch."),
)
@SYMMETRY
def test_every_width(tmp_path, saved, dtype, symmetric, group, bits):
    base = saved("llama", dtype)
    plan = uniform(tiny_model("llama", dtype), bits, group, symmetric, sparsity=0.25)
    compressed = write(base, tmp_path / "out", plan)
    assert_loads_exactly(tmp_path / "out", compressed, dtype, base)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert ("dequantize" in config) == (not symmetric)


@DTYPES
def test_mixed_symmetric_widths_and_groups_with_some_layers_left_alone(tmp_path, saved, dtype):
    base = saved("llama", dtype)
    settings = [(2, -1), (3, 16), None, (4, 8), (5, -1), (8, 16), None, (6, -1)]
    plan = by_group(lambda group: settings[group] and QuantSpec("rtn", *settings[group]))
    compressed = write(base, tmp_path / "out", plan)
    assert len(compressed) == 10
    assert_loads_exactly(tmp_path / "out", compressed, dtype, base)


def test_pruned_but_unquantized_layers_beside_quantized_ones(tmp_path, saved):
    base = saved("llama")
    prune = PruneSpec("magnitude", 0.5)
    plan = by_group(lambda group: QuantSpec("rtn", 4, -1) if group % 2 else None, prune)
    compressed = write(base, tmp_path / "out", plan)
    assert_loads_exactly(tmp_path / "out", compressed, torch.float32, base)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3", "phi3", "opt", "gpt_neox"])
@SYMMETRY
def test_every_family_that_the_format_holds(tmp_path, saved, family, symmetric):
    base = saved(family)
    plan = uniform(tiny_model(family), 4, -1, symmetric)
    compressed = write(base, tmp_path / "out", plan)
    assert_loads_exactly(tmp_path / "out", compressed, torch.float32, base)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@SYMMETRY
def test_widths_that_do_not_fill_the_packed_words(tmp_path, bits, symmetric):
    """172 and 64 columns, and 172 rows of zero-points."""
    config = AutoConfig.for_model(
        "llama", vocab_size=96, hidden_size=64, intermediate_size=172, num_hidden_layers=1,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    compressed = write(base, tmp_path / "out", uniform(model, bits, -1, symmetric))
    assert {weight.codes.shape[1] for weight in compressed.values()} == {64, 172}
    assert_loads_exactly(tmp_path / "out", compressed, torch.float32, base)


@DTYPES
def test_dense_holds_everything_even_transposed(tmp_path, saved, dtype):
    base = saved("gpt2", dtype)
    plan = uniform(tiny_model("gpt2"), 3, 16, symmetric=False, sparsity=0.5)
    compressed = write(base, tmp_path / "out", plan, DENSE)
    assert_loads_exactly(tmp_path / "out", compressed, dtype, base)


@pytest.mark.parametrize("other", [(3, -1, False), (4, 16, False), (4, -1, True)])
def test_mixed_asymmetric_is_refused(other):
    plan = by_group(lambda group: QuantSpec("rtn", *(other if group == 3 else (4, -1, False))))
    with pytest.raises(InputError, match=r"zero-points and mixed settings"):
        check(PACKED, tiny_model("llama"), plan)
    check(DENSE, tiny_model("llama"), plan)


@pytest.mark.parametrize("other", [(3, -1), (4, 16), None])
def test_a_group_of_several_settings_is_said_aloud(tmp_path, saved, other):
    """Serving engines fuse q/k/v and gate/up: one setting for all of them. Transformers does not mind."""
    base, model = saved("llama"), tiny_model("llama")
    name = "model.layers.1.self_attn.k_proj"
    layers = [
        LayerPlan(
            n, None, (other and QuantSpec("rtn", *other)) if n == name else QuantSpec("rtn", 4, -1)
        )
        for n in open_model(model).topology.linears()
    ]
    plan = CompressionPlan(tuple(layers))
    contents = planned_contents(plan, open_model(model))
    assert "vLLM fuses model.layers.1.self_attn.q_proj/k_proj/v_proj" in PACKED.notes(contents)[0]
    compressed = write(base, tmp_path / "out", plan)
    assert_loads_exactly(tmp_path / "out", compressed, torch.float32, base)
    assert PACKED.loaded_bytes(tmp_path / "out", contents).engine == "transformers"


@pytest.mark.parametrize("listed", [True, False], ids=["with-nothing-to-do", "left-out"])
def test_asymmetric_beside_groups_that_are_left_alone(tmp_path, saved, listed):
    base = saved("llama")
    plan = by_group(lambda group: QuantSpec("rtn", 4, -1, False) if group else None)
    if not listed:
        plan = CompressionPlan(plan.layers[3:])
    compressed = write(base, tmp_path / "out", plan)
    assert len(compressed) == 11
    assert_loads_exactly(tmp_path / "out", compressed, torch.float32, base)


def test_conv1d_is_refused_by_name():
    model = tiny_model("gpt2")
    with pytest.raises(InputError, match=r"transformer\.h\.0\.attn\.c_attn, a Conv1D"):
        check(PACKED, model, uniform(model, 4, -1))


def test_a_plan_without_quantization_is_refused():
    model = tiny_model("llama")
    recipe = Recipe(PruneSpec("magnitude", 0.5), None)
    with pytest.raises(InputError, match="quantizes none"):
        check(PACKED, model, uniform_plan(open_model(model).topology.shapes, recipe))


@SYMMETRY
def test_files_name_no_sparsity_and_carry_one_metadata_key(tmp_path, saved, symmetric):
    base = saved("llama")
    plan = uniform(tiny_model("llama"), 4, -1, symmetric, sparsity=0.5)
    write(base, tmp_path / "out", plan)
    assert "sparsity" not in (tmp_path / "out/config.json").read_text()
    with safe_open(tmp_path / "out/model.safetensors", "pt") as stream:
        assert stream.metadata() == {"format": "pt"}
        kinds = {re.sub(r".*\.", "", name) for name in stream.keys()}  # noqa: SIM118
    zero_points = set() if symmetric else {"weight_zero_point"}
    packed = {"weight_packed", "weight_scale", "weight_shape", "weight"}
    assert kinds == packed | zero_points


def test_the_same_weights_give_the_same_bytes(tmp_path, saved):
    base = saved("llama")
    plan = uniform(tiny_model("llama"), 3, 16, False, sparsity=0.25)
    for name in ("first", "second"):
        write(base, tmp_path / name, plan)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


@pytest.mark.parametrize("family", ["gemma3", "opt", "gpt2"])
def test_tied_embeddings_are_written_once(tmp_path, saved, family):
    base = saved(family)
    model = AutoModelForCausalLM.from_pretrained(base)
    topology = open_model(model).topology
    assert topology.tied
    plan = uniform(model, 4, -1)
    write(base, tmp_path / "out", plan, DENSE)
    with safe_open(tmp_path / "out/model.safetensors", "pt") as stream:
        names = set(stream.keys())
        shapes = [tuple(stream.get_slice(name).get_shape()) for name in names]
    assert f"{topology.head}.weight" not in names
    assert shapes.count(tuple(model.get_input_embeddings().weight.shape)) == 1
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert reloaded.get_output_embeddings().weight is reloaded.get_input_embeddings().weight


def test_weights_in_several_shards(tmp_path, saved, monkeypatch):
    monkeypatch.setattr("srcr.formats.shards.MAX_SHARD", "20KB")
    base = saved("llama")
    plan = uniform(tiny_model("llama"), 4, -1)
    compressed = write(base, tmp_path / "out", plan)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    assert_loads_exactly(tmp_path / "out", compressed, torch.float32, base)
    written = PACKED.read(tmp_path / "out")
    for name, weight in compressed.items():
        assert torch.equal(written.weight(name), weight.dequantize())
        assert torch.equal(written.read(name).codes, weight.codes)
