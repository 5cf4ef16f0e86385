"""Experts taken apart and put together again, and where checkpoints have them."""

import pytest
import torch
from safetensors import safe_open

from architectures import tiny_architecture
from srcr.errors import InputError
from srcr.models.checkpoint import open_model
from srcr.models.experts import Routing, experts_of, in_common, routing_of, sampling
from srcr.models.naming import NamedSource
from srcr.models.unfuse import fuse, unfuse

#: Layouts of every kind: gate and up below each other, interleaved, without a gate, transposed, with biases;
#: names of the hub by expert, other ones, in stacks, in stacks of another layout; experts that are given
#: scaled inputs.
LAYOUTS = (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe",
    "llama4_text", "nemotron_h", "jamba", "phimoe", "inkling2_text",
)  # fmt: skip
IDS = (torch.arange(24).view(2, 12) * 7 + 3) % 90


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("kind", LAYOUTS)
def test_experts_give_what_their_stack_gives(kind):
    model = tiny_architecture(kind)
    expected, before = logits(model), {n: p.clone() for n, p in model.state_dict().items()}
    experts = experts_of(unfuse(model))
    assert experts
    assert torch.allclose(logits(model), expected, atol=1e-5)
    with sampling(model):
        assert torch.allclose(logits(model), expected, atol=1e-5)
    after = fuse(model).state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_experts_share_the_memory_of_their_stack():
    model = tiny_architecture("qwen3_moe")
    stack = model.model.layers[0].mlp.experts.down_proj
    linear = unfuse(model).model.layers[0].mlp.experts.get_submodule("2.down_proj")
    assert linear.weight.data_ptr() == stack[2].data_ptr()


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_checkpoint_is_read_an_expert_at_a_time(kind, tmp_path):
    model = tiny_architecture(kind)
    model.save_pretrained(tmp_path)
    opened = open_model(tmp_path)
    assert isinstance(opened.source, NamedSource)
    assert not opened.leftovers
    with safe_open(tmp_path / "model.safetensors", "pt") as stream:
        stored = set(stream.keys())
    assert {place.parameter for place in opened.topology.stored.values()} >= stored
    for name, tensor in unfuse(model).state_dict().items():
        assert torch.equal(opened.blockwise.tensor(name), tensor), name


def test_files_may_have_the_names_of_the_model(tmp_path):
    model = tiny_architecture("mixtral")
    model.save_pretrained(tmp_path, save_original_format=False)
    with safe_open(tmp_path / "model.safetensors", "pt") as stream:
        assert any(name.endswith("experts.gate_up_proj") for name in stream.keys())  # noqa: SIM118
    opened = open_model(tmp_path)
    assert torch.equal(logits(opened.loaded()), logits(model))


def test_routers_and_shared_gates_are_left_as_they_are():
    topology = open_model(tiny_architecture("qwen2_moe")).topology
    assert topology.untouched == (
        "model.layers.0.mlp.shared_expert_gate",
        "model.layers.1.mlp.shared_expert_gate",
    )
    assert "model.layers.0.mlp.shared_expert.up_proj" in set(topology.linears())
    topology = open_model(tiny_architecture("llama4_text")).topology
    assert "model.layers.0.feed_forward.router" in topology.untouched


def test_the_same_linears_of_all_experts_are_decided_on_together():
    block = open_model(tiny_architecture("mixtral")).topology.blocks[1]
    labels = [group.label for group in block.decisions]
    assert labels[-2:] == [
        "model.layers.1.mlp.experts.*.gate_proj/up_proj",
        "model.layers.1.mlp.experts.*.down_proj",
    ]
    assert [len(group.inputs()) for group in block.decisions] == [1, 1, 4, 4]
    assert sorted(n for g in block.decisions for n in g.names) == sorted(block.linears())


@pytest.mark.parametrize("kind", ["longcat_flash", "jetmoe"])
def test_a_layout_that_is_not_known_is_refused_by_name(kind):
    with pytest.raises(InputError, match=r"LongcatFlashExperts|is a stack of matrices"):
        open_model(tiny_architecture(kind))


def test_every_expert_is_handed_its_tokens_and_a_sample():
    model = unfuse(tiny_architecture("mixtral"))
    experts = next(iter(experts_of(model).values()))
    states = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([[0, 2]] * 12 + [[2, 0]] * 8)
    weights = torch.rand(20, 2, generator=torch.Generator().manual_seed(1))
    handed = {}
    for number, expert in enumerate(experts.experts()):
        expert.up_proj.register_forward_pre_hook(
            lambda _, args, number=number: handed.update({number: args[0]})
        )
    experts(states, index, weights)
    assert set(handed) == {0, 2}  # the others have no work
    assert torch.equal(handed[0], states)
    with sampling(model):
        experts(states, index, weights)
    assert set(handed) == {0, 1, 2, 3}
    starved, routing = handed[1], routing_of(handed[1])
    assert routing.count == 0
    assert routing.sampled == len(starved) == 10  # the mean load: 20 tokens, 2 of 4 experts each
    assert torch.equal(starved, states[routing.ids - 20])
    routing = routing_of(handed[2])
    assert torch.equal(routing.ids[:20], torch.arange(20))
    assert torch.equal(routing.gates, torch.cat([weights[:12, 1], weights[12:, 0]]))


def test_tokens_in_common_are_paired():
    gates = torch.ones(3)
    left = Routing(torch.tensor([1, 4, 7, 20, 25]), 3, gates)
    right = Routing(torch.tensor([0, 4, 7, 9, 20, 25]), 4, torch.ones(4))
    here, there = in_common(left, right)
    assert torch.equal(left.ids[here], right.ids[there])
    assert left.ids[here].tolist() == [4, 7, 20, 25]


def test_factors_of_tokens():
    routing = Routing(torch.tensor([1, 4, 20]), 2, torch.tensor([0.2, 0.8]))
    assert routing.factors(0.25).squeeze().tolist() == [1, 1, 0.5]
    assert routing.factors(0.3).squeeze().tolist() == [1, 1, 0.5]  # a power of two
    assert routing.factors(0.25, gates=True).squeeze().tolist() == [0.25, 1, 0.5]
    assert routing.factors(float("inf")).squeeze().tolist() == [0, 0, 1]


def test_stacks_are_shared_where_they_were_read_so(tmp_path):
    tiny_architecture("mixtral").save_pretrained(tmp_path)
    opened = open_model(tmp_path)
    model = opened.loaded()
    linear = model.model.layers[0].mlp.experts.get_submodule("2.down_proj")
    stacked = opened.stacked()
    assert torch.equal(logits(stacked), logits(model))
    assert stacked.model.layers[0].mlp.experts.down_proj[2].data_ptr() == linear.weight.data_ptr()
