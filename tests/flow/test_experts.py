"""Mixtures of experts from end to end: every expert compressed, and read by transformers as it stands."""

import copy
import json
from collections import Counter
from functools import partial

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import srcr
from architectures import tiny_architecture
from srcr.errors import InputError
from srcr.formats import get_format
from srcr.models.checkpoint import open_model
from srcr.pipelines.compress import compress
from srcr.planning.space import level_grid
from srcr.records.routing import expert_tokens, routing_notes
from srcr.structure.experts import AVERAGES, expert_contributions, least_experts
from srcr.transforms.fewer_experts import chosen_experts

EXPERTS = 16
#: How many experts there are, by the names that configs have for it.
COUNTS = dict.fromkeys(
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS
)
#: Families, with what calls the number of experts of a token, and the format they come out in.
FAMILIES = {
    "mixtral": ("num_local_experts", "compressed-tensors"),
    "qwen2_moe": ("num_experts", "compressed-tensors"),
    "qwen3_moe": ("num_experts", "compressed-tensors"),
    "olmoe": ("num_experts", "compressed-tensors"),
    "deepseek_v2": ("n_routed_experts", "compressed-tensors"),
    "deepseek_v3": ("n_routed_experts", "compressed-tensors"),
    "gpt_oss": ("num_local_experts", "dense"),
    "granitemoe": ("num_local_experts", "dense"),
    "llama4_text": ("num_local_experts", "dense"),
}
RUN = srcr.RunOptions(quiet=True)
IDS = torch.randint(3, 90, (8, 32), generator=torch.Generator().manual_seed(0))


def mixture(kind, folder, chosen=2, **settings):
    """The folder of a tiny mixture of so many experts."""
    if kind in FAMILIES:
        settings[FAMILIES[kind][0]] = EXPERTS
    model = tiny_architecture(kind, num_experts_per_tok=chosen, **settings)
    model.save_pretrained(folder)
    return str(folder)


def stored_names(folder):
    names = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as stream:
            names += stream.keys()
    return names


@torch.no_grad()
def logits(model):
    return model(IDS[:2], use_cache=False).logits


@pytest.mark.parametrize("chosen", [2, 8])
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_expert_of_a_family_is_compressed(kind, chosen, tmp_path):
    base = mixture(kind, tmp_path / "base", chosen)
    record = compress(base, tmp_path / "out", None, IDS, RUN, bits=8, sparsity=0.25, group_size=-1)
    assert record.format == FAMILIES[kind][1]
    assert record.verification.difference <= record.verification.tolerance
    assert record.loader == "transformers"
    topology = open_model(base).topology
    routed = [name for name in topology.linears() if topology.routed(name)]
    assert len(routed) == 3 * EXPERTS * len(topology.experts)
    compressed = {layer.name: layer for layer in record.layers}
    assert compressed.keys() == set(topology.linears())
    assert all(compressed[name].sparsity == pytest.approx(0.25, abs=0.02) for name in routed)
    if record.format == "compressed-tensors":
        packed = [n for n in stored_names(tmp_path / "out") if n.endswith("_packed")]
        assert len(packed) == len(compressed)
        assert sum(".experts." in name for name in packed) == len(routed)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    own = get_format(record.format).read(tmp_path / "out").dequantized(torch.float32)
    assert torch.allclose(logits(plain), logits(own), atol=1e-4)
    zeros = Counter()
    for name, weight in open_model(plain).source._tensors.items():
        if name.endswith("proj.weight") and ".experts." in name:
            zeros[bool((weight == 0).float().mean() > 0.2)] += 1
    assert zeros == {True: len(routed)}


def test_tokens_are_counted_and_starved_experts_named(tmp_path):
    base = mixture("mixtral", tmp_path / "base")
    record = compress(base, tmp_path / "out", None, IDS[:1, :4], RUN, bits=8, group_size=-1)
    tokens = expert_tokens(record.layers)
    assert len(tokens) == 2 * EXPERTS
    for layer in range(2):
        here = [n for name, n in tokens.items() if f"layers.{layer}." in name]
        assert sum(here) == 2 * 4  # each token goes to two
    starved = [name for name, count in tokens.items() if count == 0]
    notes = routing_notes(record.layers)
    assert f"{len(starved)} of {2 * EXPERTS} experts were given no token" in notes[1]
    assert starved[0] in notes[1]
    assert set(notes) <= set(record.notes)
    assert all(layer.error == layer.error for layer in record.layers)  # none is NaN
    written = json.loads((tmp_path / "out" / "srcr.json").read_text())
    assert {each.get("tokens") is not None for each in written["layers"]} == {True, False}


def test_experts_get_one_group_size(tmp_path):
    base = mixture(
        "qwen3_moe", tmp_path / "base", hidden_size=128, moe_intermediate_size=96, head_dim=32
    )
    record = compress(base, tmp_path / "out", None, IDS, RUN, bits=4)
    assert record.loader == "transformers"
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    targets = {
        next(iter(group["targets"])): group["weights"]["group_size"]
        for group in config["config_groups"].values()
    }
    assert targets[r"re:.*\.experts\.\d+\..*"] == 32
    assert sorted(targets.values()) == [32, 128]


def test_experts_of_several_schemes_are_opened_by_srcr(tmp_path):
    base = mixture("qwen3_moe", tmp_path / "base")
    settings = {"overrides": {"*experts.3.*": {"bits": 8}}, "group_size": -1}
    record = compress(base, tmp_path / "out", None, IDS, RUN, bits=4, **settings)
    assert record.loader == "srcr"
    assert any("transformers stacks experts" in note for note in record.notes)
    assert record.verification.difference <= record.verification.tolerance
    assert type(srcr.load(tmp_path / "out")).__name__ == "Qwen3MoeForCausalLM"


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    base = mixture("qwen2_moe", tmp_path / "base")
    settings = {"bits": 4, "group_size": -1, "remove": "experts=4"}
    compress(base, tmp_path / "whole", None, IDS, RUN, **settings)
    from srcr.pipelines import blocks

    done = []

    def stop(self, index):
        done.append(index)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(blocks._Visitor, "advance", stop)
        with pytest.raises(KeyboardInterrupt):
            compress(base, tmp_path / "out", None, IDS, RUN, **settings)
    output = srcr.Output(tmp_path / "out", resume=True)
    compress(base, output, None, IDS, RUN, **settings)
    assert done == [0]
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3", "gpt_oss", "granitemoe", "llama4_text"])
def test_experts_are_removed(kind, tmp_path):
    grouped = {"n_group": 4, "topk_group": 2} if kind == "deepseek_v3" else {}
    base = mixture(kind, tmp_path / "base", **grouped)
    record = compress(
        base, srcr.Output(tmp_path / "out", format="dense"), None, IDS, RUN, bits=16, remove="experts=0.25"
    )  # fmt: skip
    structure = record.structures[0]
    assert (structure.kind, structure.before, structure.after) == ("experts", EXPERTS, 12)
    assert all(len(gone) == 4 for gone in structure.experts.values())
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert set(open_model(smaller).topology.experts.values()) == {12}
    whole = open_model(base)
    contributions = expert_contributions(whole.blockwise, [IDS], lambda _: None)
    groups = 4 if kind == "deepseek_v3" else 1
    choices = [least_experts(contributions, 4, average, groups) for average in AVERAGES]
    assert structure.experts in choices
    assert torch.allclose(logits(smaller), logits(without(whole, structure.experts)), atol=1e-4)


def without(opened, gone):
    """The whole model, whose routers never choose some experts."""
    model = opened.loaded(torch.float32)
    for name, numbers in gone.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        router = next(getattr(parent, n) for n in ("gate", "router") if hasattr(parent, n))
        kept = torch.tensor([n for n in range(EXPERTS) if n not in numbers])
        router.register_forward_hook(partial(reroute, kept))
    return model


def reroute(kept, router, args, output):
    """What a router gives that knows some experts only, by their numbers among all."""
    smaller = copy.deepcopy(router)
    smaller._forward_hooks.clear()
    for name, tensor in [*router.named_parameters(), *router.named_buffers()]:
        if len(tensor) == EXPERTS:
            rows = torch.nn.Parameter(tensor[kept], False)
            owner = smaller._parameters if name in smaller._parameters else smaller._buffers
            owner[name] = rows
    for key in ("num_experts", "n_routed_experts", "out_features"):
        if hasattr(smaller, key):
            setattr(smaller, key, len(kept))
    given = smaller(*args)
    if not given[-1].is_floating_point():  # logits, weights, numbers
        return *given[:-1], kept[given[-1]]
    scores = torch.zeros_like(output[0])  # of Llama 4: a score for every expert
    scores[:, kept] = given[0]
    return scores, output[1]


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("experts=15", "every token is routed to 2: use experts=14"),
        ("experts=16", "at least one must go"),
        ("channels=0.25", "remove experts"),
    ],
)
def test_what_cannot_be_removed_is_said_before_the_work(remove, message, tmp_path):
    base = mixture("mixtral", tmp_path / "base")
    with pytest.raises(InputError, match=message):
        compress(base, tmp_path / "out", None, IDS, RUN, bits=8, remove=remove)
    assert not (tmp_path / "out").exists()


def test_a_model_without_experts_has_none_to_remove(tmp_path):
    with pytest.raises(InputError, match="has no experts that could be removed"):
        compress("bundled", tmp_path / "out", None, IDS, RUN, bits=8, remove="experts=1")


def test_experts_go_from_every_group_of_a_router(tmp_path):
    base = mixture("deepseek_v3", tmp_path / "base", n_group=4, topk_group=2)
    with pytest.raises(InputError, match="use a multiple of 4, as experts=4"):
        compress(base, tmp_path / "out", None, IDS, RUN, bits=8, remove="experts=3")


def test_the_number_of_experts_of_a_token_is_no_other_number(tmp_path):
    base = mixture("glm_moe_dsa", tmp_path / "base", n_routed_experts=EXPERTS)
    assert chosen_experts(open_model(base)) == 2


@pytest.mark.parametrize("stage", ["distill", "blockwise"])
def test_a_mixture_is_trained_under_its_grid(stage, tmp_path):
    base = mixture("qwen3_moe", tmp_path / "base")
    compress(base, tmp_path / "out", None, IDS, RUN, bits=3, group_size=-1)
    text = srcr.RecoveryText((IDS,), held_out=IDS.flip(1))
    spec = srcr.RecoverySpec(steps=2, stage=stage, batch=1)
    record = srcr.recover(base, tmp_path / "out", tmp_path / "better", spec, text, RUN)
    assert record.recoveries
    before, after = (srcr.load(tmp_path / name) for name in ("out", "better"))
    assert before.state_dict().keys() == after.state_dict().keys()


def test_a_search_decides_for_all_experts_of_a_layer(tmp_path):
    base = tiny_architecture("mixtral")
    base.save_pretrained(tmp_path / "base")
    space = srcr.SearchSpace(level_grid([0.0, 0.25], [3, 4]), quant=srcr.QuantSpec(group_size=-1))
    ids = torch.randint(3, 90, (40, 24), generator=torch.Generator().manual_seed(1))
    result = srcr.search(
        str(tmp_path / "base"), srcr.Target(tcr=0.78), space, srcr.Calibration(ids),
        tmp_path / "out", srcr.SearchSpec(trials=2, structures=(srcr.StructureSpec(experts=1),)), RUN,
    )  # fmt: skip
    experts = [group for group in result.groups if ".experts." in group[0]]
    assert [len(group) for group in experts] == [8, 4, 8, 4]  # gate and up, down; of two layers
    finalists = {each.compressed: each for each in result.finalists}
    for group in experts:
        layers = [n for n in finalists["allocated"].plan.layers if n.name in group]
        assert len({(layer.sparsity > 0, layer.bits) for layer in layers}) == 1
    smaller = finalists["allocated, 3 of 4 experts"]
    assert smaller.plan.structures == srcr.StructureSpec(experts=1)
    bits = [
        sum(n.bits * (1 - n.sparsity) for n in each.plan.layers) / len(each.plan.layers)
        for each in (finalists["allocated"], smaller)
    ]
    assert bits[1] > bits[0]  # at the same size, more for what is left
    for each in (finalists["allocated"], smaller):
        assert 0.78 <= each.rates.tcr < 0.82
    assert result.chosen in finalists


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_an_archive_of_a_mixture_becomes_the_same_files(kind, tmp_path):
    base = mixture(kind, tmp_path / "base")
    first = srcr.Output(tmp_path / "first", format="archive")
    compress(base, first, None, IDS, RUN, bits=4, group_size=-1)
    compress(
        base, srcr.Output(tmp_path / "dense", format="dense"), None, IDS, RUN, bits=4, group_size=-1
    )
    srcr.export(tmp_path / "first", srcr.Output(tmp_path / "again", format="dense"), RUN)
    for path in (tmp_path / "dense").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    assert torch.equal(logits(srcr.load(tmp_path / "first")), logits(srcr.load(tmp_path / "dense")))


def test_gptq_holds_no_experts(tmp_path):
    base = mixture("mixtral", tmp_path / "base")
    with pytest.raises(InputError, match="gptq"):
        compress(
            base, srcr.Output(tmp_path / "out", format="gptq"), None, IDS, RUN, bits=4, group_size=-1
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_models_are_evaluated_beside_their_base(tmp_path):
    base = mixture("mixtral", tmp_path / "base")
    compress(base, tmp_path / "out", None, IDS, RUN, bits=8, group_size=-1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    folder, in_memory = srcr.evaluate(base, [tmp_path / "out", model], IDS, options=RUN)
    assert folder.divergence.kl.value == pytest.approx(in_memory.divergence.kl.value, rel=1e-4)
    assert 0 < folder.divergence.kl.value < 0.1
