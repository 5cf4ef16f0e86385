"""What observe() sees in real models of many families."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from srcr.errors import InputError
from srcr.models.matrices import read_matrix
from srcr.models.observe import observe
from srcr.testing import FAMILIES, tiny_model

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SEPARATE = [
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
]
#: Family -> (blocks, groups of each block in the order they run, tied embeddings).
EXPECTED = {
    "llama": ("model.layers", SEPARATE, False),
    "mistral": ("model.layers", SEPARATE, False),
    "qwen2": ("model.layers", SEPARATE, False),
    "qwen3": ("model.layers", SEPARATE, False),
    "gemma2": ("model.layers", SEPARATE, True),
    "gemma3": ("model.layers", SEPARATE, True),
    "phi3": (
        "model.layers",
        [("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)],
        False,
    ),
    "opt": (
        "model.decoder.layers",
        [
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.out_proj",),
            ("fc1",),
            ("fc2",),
        ],
        True,
    ),
    "gpt_neox": (
        "gpt_neox.layers",
        [
            ("attention.query_key_value",),
            ("attention.dense",),
            ("mlp.dense_h_to_4h",),
            ("mlp.dense_4h_to_h",),
        ],
        False,
    ),
    "gpt2": (
        "transformer.h",
        [("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)],
        True,
    ),
}


def build(kind, **settings):
    """A random causal LM of any model type, small."""
    config = AutoConfig.for_model(kind, **(SIZES | settings))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def groups_of(block):
    """A group's members have no order that matters; the groups have."""
    return [{name.removeprefix(f"{block.name}.") for name in group.names} for group in block.groups]


def test_every_family_has_an_expectation():
    assert set(EXPECTED) == set(FAMILIES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_groups_and_head(family, dtype):
    model = tiny_model(family, dtype)
    topology = observe(model)
    home, groups, tied = EXPECTED[family]
    assert [block.name for block in topology.blocks] == [f"{home}.0", f"{home}.1"]
    for block in topology.blocks:
        assert groups_of(block) == [set(names) for names in groups]
    assert model.get_submodule(topology.head) is model.get_output_embeddings()
    assert topology.tied is tied


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_the_blocks_is_listed_once_with_its_shape(family):
    model = tiny_model(family)
    topology = observe(model)
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not model.get_output_embeddings()
    }
    assert sorted(topology.linears()) == sorted(linears)
    assert set(topology.shapes) == set(linears)
    for name, module in linears.items():
        out, into = topology.shapes[name]
        x = torch.randn(3, into)
        assert module(x).shape == (3, out)
        bias = 0 if module.bias is None else module.bias
        torch.testing.assert_close(
            module(x), x @ read_matrix(model, topology.matrices[name]).T + bias
        )
    transposed = {name for name, module in linears.items() if isinstance(module, Conv1D)}
    assert set(topology.transposed()) == transposed
    assert bool(transposed) == (family == "gpt2")


def test_watching_leaves_the_model_as_it_was():
    model = tiny_model("llama")
    ids = torch.arange(12)[None]
    before = model(ids).logits
    observe(model)
    assert torch.equal(model(ids).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_head_of_another_name():
    model = build("biogpt")
    topology = observe(model)
    assert topology.head == "output_projection"
    assert topology.tied
    assert "output_projection" not in topology.shapes


@pytest.mark.parametrize("tie", [True, False])
def test_tied_follows_the_weights(tie):
    model = build("llama", tie_word_embeddings=tie)
    assert observe(model).tied is tie


@pytest.mark.parametrize(
    ("kind", "together"),
    [
        ("cohere", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                    "mlp.gate_proj", "mlp.up_proj"}),
        ("phi", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"}),
    ],
)  # fmt: skip
def test_parallel_blocks_share_an_input_between_attention_and_mlp(kind, together):
    for block in observe(build(kind)).blocks:
        assert together in groups_of(block)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        (
            "qwen3_moe",
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        ),
    ],
)
def test_fused_experts_are_refused_by_name(kind, settings):
    model = build(kind, **settings)
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.experts\.gate_up_proj \[4,"):
        observe(model)


def test_a_linear_that_does_not_run_is_refused():
    model = tiny_model("llama")
    model.model.layers[1].mlp.spare = nn.Linear(32, 32)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.spare does not run"):
        observe(model)


def test_a_linear_that_runs_twice_is_refused():
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj = model.model.layers[0].mlp.gate_proj
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.gate_proj runs 2 times"):
        observe(model)


def test_blocks_that_share_their_weights_are_refused():
    model = tiny_model("llama")
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(InputError):
        observe(model)
