"""walk(): two streams of activations, and statistics of what a layer will really see."""

from dataclasses import dataclass, replace

import pytest
import torch

from srcr.data.tokens import Tokens
from srcr.engine.memory import MemoryPolicy, token_batches
from srcr.engine.walk import walk
from srcr.errors import NumericalError, SrcrError
from srcr.models import blockwise
from srcr.models.checkpoint import open_model
from srcr.models.matrices import read_matrix
from srcr.models.topology import LinearGroup
from srcr.numerics import moments
from srcr.testing import FAMILIES, tiny_model

LENGTH = 24


def token_ids(n=5, length=LENGTH):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 96, (n, length), generator=generator)


def visit_all(model, ids, visit, dense_batches=None, policy=MemoryPolicy(), advanced=None):
    """What each visit returns; in batches of two, the last one smaller."""
    on_advance = (lambda _: None) if advanced is None else advanced.append
    source = open_model(model).blockwise
    return list(walk(source, ids.split(2), visit, on_advance, dense_batches, policy))


def altered(weight, name):
    """Another weight of the same size, the same whenever it is asked for."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return weight + 0.5 * weight.std() * torch.randn(weight.shape, generator=generator)


#: Where the matrices of a kind of model are.
MATRICES = {}


@torch.no_grad()
def alter(model, name):
    """Give the model's own linear the altered weight."""
    if type(model) not in MATRICES:
        MATRICES[type(model)] = open_model(model).topology.matrices
    weight = read_matrix(model, MATRICES[type(model)][name])
    weight.copy_(altered(weight.float(), name))


@torch.no_grad()
def inputs_of_each(model, names, ids):
    """What linears are given in an ordinary forward pass: each [tokens, width], by name."""
    seen, handles = {}, []
    for name in names:
        handles.append(
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: seen.setdefault(name, args[0])
            )
        )
    try:
        model(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: x.reshape(-1, x.shape[-1]) for name, x in seen.items()
    }  # OPT has no batch axis here


def inputs_of(model, name, ids):
    """What a linear is given in an ordinary forward pass: [tokens, width]."""
    return inputs_of_each(model, [name], ids)[name]


def cross_of(statistics, name, W):
    """W X_d^T X [rows, cols] of a linear W, however it was summed up."""
    if statistics.input_cross is not None:
        return W @ statistics.input_cross
    return statistics.weight_cross[name]


def close(actual, expected, rtol=1e-4, part=1e-4):
    atol = part * float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_visit_that_changes_nothing_sees_the_dense_model_in_both_streams(family):
    model, ids = tiny_model(family), token_ids()

    def visit(pair):
        first = pair.groups[0]
        return first.names[0], pair.weight(first.names[0]), pair.statistics(first, cross=True)

    for name, W, statistics in visit_all(tiny_model(family), ids, visit):
        x = inputs_of(model, name, ids)
        close(statistics.hessian, x.T @ x)
        close(cross_of(statistics, name, W), W @ x.T @ x)


@pytest.mark.slow
@pytest.mark.parametrize("running", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cached", [None, 1])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "opt", "gpt_neox", "gpt2"])
def test_statistics_are_those_of_the_model_compressed_so_far(family, cached, running, monkeypatch):
    monkeypatch.setattr(blockwise, "running_precision", lambda *_: running)  # whatever the CPU
    rough = {"rtol": 0.02, "part": 0.02} if running == torch.bfloat16 else {}
    dense = tiny_model(family)
    model = tiny_model(family)  # modified step by step, independently of the engine
    source, ids = tiny_model(family), token_ids()
    linears = list(open_model(source).topology.linears())
    dense_inputs = inputs_of_each(dense, linears, ids)
    checked = []

    def visit(pair):
        for group in pair.groups:
            statistics = pair.statistics(group, cross=True)
            inputs = inputs_of_each(model, group.names, ids)
            for name in group.names:
                x, x_dense = inputs[name], dense_inputs[name]
                close(statistics.hessian, x.T @ x, **rough)
                close(
                    cross_of(statistics, name, pair.weight(name)),
                    pair.weight(name) @ x_dense.T @ x,
                    **rough,
                )
                checked.append(name)
            for name in group.names:
                pair.replace(name, altered(pair.weight(name), name))
                alter(model, name)

    visit_all(source, ids, visit, policy=MemoryPolicy(cached))
    assert sorted(checked) == sorted(linears)
    for name, parameter in source.named_parameters():
        assert torch.equal(parameter, dense.get_parameter(name)), "the source itself was changed"


@pytest.mark.parametrize("dense_batches", [None, 1])
def test_tokens_of_extreme_energy_are_scaled_down_in_all_moments(dense_batches, monkeypatch):
    """Batch by batch, by what the modified model is given, in both streams alike."""
    monkeypatch.setattr(moments, "MOST_ENERGY", 0.9)  # so that there are some
    dense, model, ids = tiny_model("llama"), tiny_model("llama"), token_ids()
    paired = ids if dense_batches is None else ids[:2]
    changed = []

    def scaled(model, name, ids):
        """Inputs of both models, scaled as the modified one's are."""
        parts = []
        for batch in ids.split(2):
            x, x_dense = inputs_of(model, name, batch), inputs_of(dense, name, batch)
            norms = x.norm(dim=1, keepdim=True)
            wanted = (0.9**0.5 * norms.median() / norms).clamp_max(1)
            scales = 2 ** wanted.log2().round()
            changed.append(bool((scales < 1).any()))
            parts.append((scales * x, scales * x_dense))
        return (torch.cat(each) for each in zip(*parts, strict=True))

    def visit(pair):
        for group in pair.groups:
            statistics = pair.statistics(group, cross=True)
            for name in group.names:
                W = pair.weight(name)
                x, _ = scaled(model, name, ids)
                close(statistics.hessian, x.T @ x)
                x, x_dense = scaled(model, name, paired)
                close(cross_of(statistics, name, W), W @ x_dense.T @ x)
                pair.replace(name, altered(W, name))
                alter(model, name)

    visit_all(tiny_model("llama"), ids, visit, dense_batches)
    assert any(changed)


@pytest.mark.slow
@pytest.mark.parametrize("cached", [None, 1])
@pytest.mark.parametrize("dense_batches", [1, 2])
def test_where_the_dense_model_runs_on_part_of_the_batches_their_moments_stand_apart(
    cached, dense_batches
):
    """Those of the batches from all over on which it runs, beside the Hessian of all."""
    dense, model, ids = tiny_model("llama"), tiny_model("llama"), token_ids(8)
    chosen = [0] if dense_batches == 1 else [0, 2]
    paired = torch.cat([ids.split(2)[i] for i in chosen])

    def visit(pair):
        for group in pair.groups:
            statistics = pair.statistics(group, cross=True)
            for name in group.names:
                W = pair.weight(name)
                x, part = inputs_of(model, name, ids), inputs_of(model, name, paired)
                close(statistics.hessian, x.T @ x)
                close(statistics.paired_hessian, part.T @ part)
                close(cross_of(statistics, name, W), W @ inputs_of(dense, name, paired).T @ part)
                pair.replace(name, altered(W, name))
                alter(model, name)

    visit_all(tiny_model("llama"), ids, visit, dense_batches, MemoryPolicy(cached))


def test_cross_moments_without_the_dense_stream_are_refused():
    with pytest.raises(AssertionError, match="dense stream"):
        visit_all(
            tiny_model("llama"),
            token_ids(),
            lambda pair: pair.statistics(pair.groups[0], cross=True),
            dense_batches=0,
        )


def test_without_cross_only_the_hessian_is_gathered():
    first, _ = visit_all(
        tiny_model("llama"), token_ids(), lambda pair: pair.statistics(pair.groups[0], cross=False)
    )
    assert first.weight_cross is first.input_cross is first.paired_hessian is None


def test_what_a_visit_replaces_is_what_later_blocks_see():
    ids, dense, model = token_ids(), tiny_model("llama"), tiny_model("llama")
    name = "model.layers.0.mlp.down_proj"
    alter(model, name)

    def visit(pair):
        if pair.index == 0:
            pair.replace(name, altered(pair.weight(name), name))
        first = pair.groups[0]
        return pair.weight(first.names[0]), pair.statistics(first, cross=True)

    _, (W, second) = visit_all(tiny_model("llama"), ids, visit)
    q_proj = "model.layers.1.self_attn.q_proj"
    x, x_dense = inputs_of(model, q_proj, ids), inputs_of(dense, q_proj, ids)
    close(second.hessian, x.T @ x)
    close(cross_of(second, q_proj, W), W @ x_dense.T @ x)
    assert not torch.allclose(x, x_dense, rtol=0.1)


def test_the_weight_a_visit_reads_stays_the_dense_one():
    def visit(pair):
        name = f"{pair.name}.mlp.up_proj"
        before = pair.weight(name).clone()
        pair.replace(name, torch.zeros_like(before))
        return torch.equal(pair.weight(name), before) and bool(before.any())

    assert visit_all(tiny_model("llama"), token_ids(), visit) == [True, True]


def test_groups_may_be_passed_over():
    """A visit may replace weights without asking for statistics, and ask for those of later groups."""
    ids, model = token_ids(), tiny_model("llama")

    def visit(pair):
        query, *_, down = pair.groups
        pair.replace(query.names[0], altered(pair.weight(query.names[0]), query.names[0]))
        name = down.names[0]
        return name, pair.weight(name), pair.statistics(down, cross=True)

    results = visit_all(tiny_model("llama"), ids, visit)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"):
        alter(model, name)
    for name, W, statistics in results:
        x, x_dense = inputs_of(model, name, ids), inputs_of(tiny_model("llama"), name, ids)
        close(statistics.hessian, x.T @ x)
        close(cross_of(statistics, name, W), W @ x_dense.T @ x)


@pytest.mark.parametrize("cached", [None, 1])
@pytest.mark.parametrize(("first", "second"), [(3, 1), (1, 1)])
def test_groups_out_of_order_are_refused(first, second, cached):
    """What passes have run past cannot be asked for: another linear's inputs were handed out."""

    def visit(pair):
        pair.statistics(pair.groups[first], cross=False)
        pair.statistics(pair.groups[second], cross=False)

    message = (
        r"layers\.0\.self_attn\.o_proj was asked for after .* in the order they run, each once"
    )
    with pytest.raises(ValueError, match=message):
        visit_all(tiny_model("llama"), token_ids(), visit, policy=MemoryPolicy(cached))


@dataclass
class Swapped:
    """A source whose topology names groups in another order than they run in."""

    source: object

    def __getattr__(self, name):
        return getattr(self.source, name)

    @property
    def topology(self):
        known = self.source.topology
        blocks = [type(block)(block.name, tuple(reversed(block.groups))) for block in known.blocks]
        return replace(known, blocks=tuple(blocks))


@pytest.mark.parametrize("cached", [None, 1])
def test_a_group_that_does_not_run_in_its_turn_is_named(cached):
    source = Swapped(open_model(tiny_model("llama")).blockwise)

    def visit(pair):
        for group in pair.groups:
            pair.statistics(group, cross=False)

    with pytest.raises(SrcrError, match=r"mlp\.down_proj did not run in its turn"):
        list(walk(source, token_ids().split(2), visit, lambda _: None, policy=MemoryPolicy(cached)))


class Skipping(torch.nn.Module):
    """An MLP that single sequences do not reach once it is ``routed``, as an expert is passed over."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp
        self.routed = False

    def forward(self, x):
        return x if self.routed and len(x) == 1 else self.mlp(x)


@pytest.mark.parametrize("cached", [None, 1])
def test_a_group_that_a_batch_skips_is_named(cached):
    """The last batch has one sequence only: there the MLP is skipped, and nobody else's inputs come."""
    model = tiny_model("llama")
    layer = model.model.layers[0]
    layer.mlp = Skipping(layer.mlp)
    opened = open_model(model)
    assert opened.topology.blocks  # the trace is over
    opened.blockwise.model.model.layers[0].mlp.routed = True

    def visit(pair):
        for group in pair.groups:
            pair.statistics(group, cross=False)

    with pytest.raises(SrcrError, match=r"mlp\.mlp\.gate_proj/up_proj did not run .* batch 2 "):
        visit_all(opened, token_ids(), visit, policy=MemoryPolicy(cached))


def test_forward_passes_behind_blocks_are_announced():
    advanced = []
    visit_all(tiny_model("llama"), token_ids(), lambda pair: None, advanced=advanced)
    assert advanced == [0]


def overflowing(family="llama"):
    """Finite weights whose activations are not: the first block's MLP overflows float32."""
    model = tiny_model(family)
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.down_proj").weight.mul_(1e38)
        model.get_submodule("model.layers.0.mlp.up_proj").weight.mul_(1e10)
    return model


def test_activations_that_overflow_name_the_layer():
    def visit(pair):
        for group in pair.groups:
            pair.statistics(group, cross=False)

    with pytest.raises(NumericalError, match=r"model\.layers\.1\.self_attn\.q_proj are not finite"):
        visit_all(overflowing(), token_ids(), visit)


def test_batches_of_any_size_give_the_same_statistics():
    model, hessians = tiny_model("gemma3"), []
    for size in (1, 3, 5):
        results = walk(
            open_model(model).blockwise,
            token_ids().split(size),
            lambda pair: [pair.statistics(group, cross=True).hessian for group in pair.groups],
            lambda _: None,
        )
        hessians.append([hessian for block in results for hessian in block])
    for singly, by_threes, at_once in zip(*hessians, strict=True):
        close(by_threes, singly)
        close(at_once, singly)


def statistics_of_all(model, ids, policy, dense_batches=None, between=lambda: None):
    """Statistics of every group, with weights replaced on the way."""

    def visit(pair):
        results = []
        for group in pair.groups:
            between()
            statistics = pair.statistics(group, cross=True)
            results.append(statistics.hessian)
            results += [cross_of(statistics, name, pair.weight(name)) for name in group.names]
            for name in group.names:
                pair.replace(name, altered(pair.weight(name), name))
        return results

    blocks = visit_all(model, ids, visit, dense_batches, policy)
    return [tensor for block in blocks for tensor in block]


@pytest.mark.parametrize(
    ("family", "dense_batches"),
    [
        *((family, None) for family in FAMILIES),
        ("llama", 2),
        ("gemma3", 2),
        ("opt", 2),
        ("gpt2", 2),
    ],
)
def test_any_memory_policy_gives_the_same_numbers(family, dense_batches, tmp_path):
    model, ids = tiny_model(family), token_ids(6)
    policies = [
        MemoryPolicy(),
        MemoryPolicy(keep_freed=True),
        MemoryPolicy(2),
        MemoryPolicy(1),
        MemoryPolicy(0),
        MemoryPolicy(0, tmp_path),
    ]
    first, *others = (statistics_of_all(model, ids, policy, dense_batches) for policy in policies)
    for other in others:
        assert all(map(torch.equal, first, other))


def test_states_on_disk_leave_no_file(tmp_path):
    seen = []
    statistics_of_all(
        tiny_model("llama"),
        token_ids(),
        MemoryPolicy(0, tmp_path),
        between=lambda: seen.extend(tmp_path.iterdir()),
    )
    assert seen == list(tmp_path.iterdir()) == []


def test_a_group_is_called_by_what_holds_it():
    group = LinearGroup(("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"))
    assert group.label == "model.layers.0.mlp.gate_proj/up_proj"


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
def test_padding_takes_no_part(family):
    """The statistics of a padded batch are those of each row run alone; positions are absolute in GPT-2 and
    OPT, so that padding on the left would move them."""
    generator = torch.Generator().manual_seed(5)
    lengths = (7, 24, 3, 7, 12)
    rows = [torch.randint(0, 96, (1, n), generator=generator) for n in lengths]
    ids, mask = torch.full((5, 26), 2), torch.zeros(5, 26, dtype=torch.int64)
    for number, row in enumerate(rows):
        ids[number, -row.shape[1] :], mask[number, -row.shape[1] :] = row, 1
    batches = token_batches(Tokens.of(ids, "padded", mask))
    assert sum(batch.numel() for batch in batches) == sum(lengths)
    model = tiny_model(family)

    def visit(pair):
        return [(g.names[0], pair.statistics(g, cross=False).hessian) for g in pair.groups]

    source = open_model(tiny_model(family)).blockwise
    for groups in walk(source, batches, visit, lambda _: None, dense_batches=0):
        for name, hessian in groups:
            alone = [inputs_of(model, name, row) for row in rows]
            close(hessian, sum(x.T @ x for x in alone), rtol=1e-5, part=1e-6)
