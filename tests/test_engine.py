"""walk(): two streams of activations, and statistics of what a layer will really see."""

from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import save_file

from srcr import engine
from srcr.compression import Calibration, Output, Recipe, compress
from srcr.errors import NumericalError
from srcr.models import weights
from srcr.models.topology import linear_weight
from srcr.models.weights import ModelWeights
from srcr.testing import FAMILIES, tiny_model
from srcr.types import QuantSpec

LENGTH = 24


@dataclass
class Steps:
    """A watcher that remembers."""

    seen: list = field(default_factory=list)

    def step(self, block, what):
        self.seen.append((block, what))


def token_ids(n=5, length=LENGTH):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 96, (n, length), generator=generator)


def visit_all(model, ids, visit):
    """Walk in batches of two, the last one smaller."""
    return list(engine.walk(ModelWeights(model), ids.split(2), visit, Steps()))


def altered(weight, name):
    """Another weight of the same size, the same whenever it is asked for."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return weight + 0.5 * weight.std() * torch.randn(weight.shape, generator=generator)


@torch.no_grad()
def inputs_of(model, name, ids):
    """What a linear is given in an ordinary forward pass: [tokens, width]."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    try:
        model(ids, use_cache=False)
    finally:
        handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])  # OPT has no batch axis here


@torch.no_grad()
def states_before(model, block, ids):
    """The hidden states that a block is given in an ordinary forward pass."""
    seen = []
    handle = model.get_submodule(block).register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    try:
        model(ids, use_cache=False)
    finally:
        handle.remove()
    return seen[0]


def close(found, expected, rtol=1e-4, part=1e-4):
    atol = part * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_visit_that_changes_nothing_sees_the_dense_model_in_both_streams(family):
    model = tiny_model(family)
    ids = token_ids()

    def visit(view):
        return view.name, (torch.cat(list(view.dense_states)), torch.cat(list(view.states)))

    for name, (dense, modified) in visit_all(model, ids, visit):
        expected = states_before(model, name, ids)
        close(dense, expected)
        assert torch.equal(dense, modified)


@pytest.mark.parametrize("running", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("waiting", [None, 1])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "opt", "gpt_neox", "gpt2"])
def test_statistics_are_those_of_the_model_compressed_so_far(family, waiting, running, monkeypatch):
    monkeypatch.setattr(weights, "running_precision", lambda *_: running)
    rough = {"rtol": 0.02, "part": 0.02} if running == torch.bfloat16 else {}
    dense = tiny_model(family)
    model = tiny_model(family)  # modified step by step, independently of the engine
    ids = token_ids()
    checked = []

    def visit(view):
        for unit in view.units:
            stats = view.statistics(unit, cross=True)
            for name in unit.names:
                x = inputs_of(model, view.full_name(name), ids)
                x_dense = inputs_of(dense, view.full_name(name), ids)
                assert stats.n_tokens == ids.numel() == len(x)
                close(stats.hessian, x.T @ x, **rough)
                full, W = view.full_name(name), view.weight(name)
                close(stats.settle({full: W}).pulled[full], W @ x_dense.T @ x, **rough)
                checked.append(view.full_name(name))
            for name in unit.names:
                full = view.full_name(name)
                weight = altered(view.weight(name), full)
                view.replace(name, weight)
                with torch.no_grad():
                    linear_weight(model.get_submodule(full)).copy_(weight)

    source = ModelWeights(tiny_model(family))
    room = engine.Room(waiting)
    list(engine.walk(source, ids.split(2), visit, Steps(), room=room))
    assert sorted(checked) == sorted(source.topology.linears())
    for name, parameter in source.model.named_parameters():
        assert torch.equal(parameter, dense.get_parameter(name)), "the source itself was changed"


@pytest.mark.parametrize("waiting", [None, 1])
@pytest.mark.parametrize("dense_batches", [1, 2])
def test_where_the_dense_model_runs_on_some_batches_their_moments_stand_apart(
    waiting, dense_batches
):
    """Those of the batches from all over on which it runs, beside the Hessian of all."""
    dense, model, ids = tiny_model("llama"), tiny_model("llama"), token_ids(8)
    batches = ids.split(2)
    some = torch.cat([batches[i] for i in ([0] if dense_batches == 1 else [0, 2])])

    def visit(view):
        for unit in view.units:
            stats = view.statistics(unit, cross=True)
            for name in unit.names:
                full, W = view.full_name(name), view.weight(name)
                x, part = inputs_of(model, full, ids), inputs_of(model, full, some)
                assert stats.n_tokens == len(x)
                close(stats.hessian, x.T @ x)
                close(stats.matched, part.T @ part)
                pulled = W @ inputs_of(dense, full, some).T @ part
                close(stats.settle({full: W}).pulled[full], pulled)
                weight = altered(W, full)
                view.replace(name, weight)
                with torch.no_grad():
                    linear_weight(model.get_submodule(full)).copy_(weight)

    source = ModelWeights(tiny_model("llama"))
    list(engine.walk(source, batches, visit, Steps(), dense_batches, engine.Room(waiting)))


def test_cross_moments_without_the_dense_stream_are_refused():
    source = ModelWeights(tiny_model("llama"))
    walk = engine.walk(
        source,
        token_ids().split(2),
        lambda view: view.statistics(view.units[0], cross=True),
        Steps(),
        dense_batches=0,
    )
    with pytest.raises(AssertionError, match="dense stream"):
        next(walk)


def test_without_cross_only_the_hessian_is_gathered():
    (first, _) = visit_all(
        tiny_model("llama"), token_ids(), lambda view: view.statistics(view.units[0], cross=False)
    )
    assert first.cross is first.pulled is first.matched is None


def test_what_a_visit_replaces_is_what_later_blocks_see():
    ids = token_ids()
    dense, model = tiny_model("llama"), tiny_model("llama")
    name = "model.layers.0.mlp.down_proj"
    with torch.no_grad():
        model.get_submodule(name).weight.copy_(altered(model.get_submodule(name).weight, name))

    def visit(view):
        if view.index == 0:
            view.replace("mlp.down_proj", altered(view.weight("mlp.down_proj"), name))
        return torch.cat(list(view.dense_states)), torch.cat(list(view.states))

    second = visit_all(dense, ids, visit)[1]
    close(second[0], states_before(dense, "model.layers.1", ids))
    close(second[1], states_before(model, "model.layers.1", ids))
    assert not torch.allclose(second[0], second[1], rtol=0.1)


def test_the_weight_a_visit_reads_stays_the_dense_one():
    def visit(view):
        before = view.weight("mlp.up_proj").clone()
        view.replace("mlp.up_proj", torch.zeros_like(before))
        return torch.equal(view.weight("mlp.up_proj"), before) and bool(before.any())

    assert visit_all(tiny_model("llama"), token_ids(), visit) == [True, True]


def test_units_may_be_passed_over():
    """A visit may replace weights without asking for statistics, and ask for those of later units."""
    ids = token_ids()
    model = tiny_model("llama")

    def visit(view):
        q, *_, down = view.units
        view.replace(q.names[0], altered(view.weight(q.names[0]), view.full_name(q.names[0])))
        name = view.full_name(down.names[0])
        weight = view.weight(down.names[0])
        return name, weight, view.statistics(down, cross=True).settle({name: weight})

    found = visit_all(tiny_model("llama"), ids, visit)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"):
        module = model.get_submodule(name)
        with torch.no_grad():
            module.weight.copy_(altered(module.weight, name))
    for name, W, stats in found:
        x, x_dense = inputs_of(model, name, ids), inputs_of(tiny_model("llama"), name, ids)
        close(stats.hessian, x.T @ x)
        close(stats.pulled[name], W @ x_dense.T @ x)


def test_the_watcher_hears_of_every_unit_and_every_forward_pass():
    steps = Steps()
    model = tiny_model("llama")

    def visit(view):
        for unit in view.units:
            view.statistics(unit, cross=False)

    list(engine.walk(ModelWeights(model), token_ids().split(2), visit, steps))
    units = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
    expected = [(0, name) for name in [*units, "forward"]] + [(1, name) for name in units]
    assert steps.seen == expected


def overflowing(family="llama"):
    """Finite weights whose activations are not: the first block's MLP overflows float32."""
    model = tiny_model(family)
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.down_proj").weight.mul_(1e38)
        model.get_submodule("model.layers.0.mlp.up_proj").weight.mul_(1e10)
    return model


def test_activations_that_overflow_name_the_layer():
    def visit(view):
        for unit in view.units:
            view.statistics(unit, cross=False)

    with pytest.raises(NumericalError, match=r"model\.layers\.1\.self_attn\.q_proj are not finite"):
        visit_all(overflowing(), token_ids(), visit)


def test_compress_stops_at_activations_that_overflow(tmp_path):
    overflowing().save_pretrained(tmp_path / "model")
    save_file({"input_ids": token_ids()}, tmp_path / "ids.safetensors")
    with pytest.raises(NumericalError, match=r"model\.layers\.\d\.\S+"):
        compress(
            tmp_path / "model",
            Recipe(None, QuantSpec()),
            Calibration(str(tmp_path / "ids.safetensors")),
            Output(tmp_path / "out"),
            quiet=True,
        )
    assert {path.name for path in tmp_path.iterdir()} == {"model", "ids.safetensors"}


def test_batches_of_any_size_give_the_same_statistics():
    model = tiny_model("gemma3")
    found = []
    for size in (1, 3, 5):
        source = ModelWeights(model)
        results = engine.walk(
            source,
            token_ids().split(size),
            lambda view: [view.statistics(unit, cross=True).hessian for unit in view.units],
            Steps(),
        )
        found.append([hessian for block in results for hessian in block])
    for one, other in zip(found[0], found[1], strict=True):
        close(one, other)
    for one, other in zip(found[0], found[2], strict=True):
        close(one, other)


def everything(model, ids, room, between=lambda view: None):
    """Statistics of every unit and the states before every block, with weights replaced on the way."""

    def visit(view):
        found = [torch.stack(list(view.states)[:2]), torch.stack(list(view.dense_states)[:2])]
        for unit in view.units:
            weights = {view.full_name(name): view.weight(name) for name in unit.names}
            stats = view.statistics(unit, cross=True).settle(weights)
            found += [stats.hessian, *stats.pulled.values()]
            for name in unit.names:
                view.replace(name, altered(view.weight(name), name))
        between(view)
        return found

    results = engine.walk(ModelWeights(model), ids.split(2), visit, Steps(), room=room)
    return [tensor for block in results for tensor in block]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_engine_may_hold_changes_no_bit(family, tmp_path):
    model, ids = tiny_model(family), token_ids()
    expected = everything(model, ids, engine.Room())
    for room in (
        engine.Room(1),
        engine.Room(0),
        engine.Room(0, tmp_path),
        engine.Room(3, tmp_path),
        engine.Room(keeps=True),
    ):
        found = everything(model, ids, room)
        assert len(found) == len(expected)
        assert all(map(torch.equal, found, expected)), room


def test_memory_goes_back_to_the_system_unless_it_is_kept(monkeypatch):
    """Before the moments of each unit, and behind each block."""
    model, ids, given_back = tiny_model("llama"), token_ids(), []
    monkeypatch.setattr(engine.memory, "release", lambda: given_back.append(1))
    everything(model, ids, engine.Room(keeps=True))
    assert not given_back
    everything(model, ids, engine.Room())
    blocks = ModelWeights(model).topology.blocks
    assert len(given_back) == sum(len(block.units) + 1 for block in blocks)


def test_states_on_disk_leave_no_file(tmp_path):
    seen = []
    everything(
        tiny_model("llama"), token_ids(), engine.Room(0, tmp_path),
        lambda _: seen.extend(tmp_path.iterdir()),
    )  # fmt: skip
    assert seen == list(tmp_path.iterdir()) == []


def test_passes_that_do_not_wait_hold_nothing():
    """Between units only those that may wait are under way."""

    def visit(view):
        for unit in view.units:
            view.statistics(unit, cross=True)
            under_way = [one._forward is not None for one in view._passes]
            assert under_way == [True, False, False]
            assert under_way == [one._forward is not None for one in view._dense_passes]
        return view.index

    walked = engine.walk(
        ModelWeights(tiny_model("llama")), token_ids().split(2), visit, Steps(), room=engine.Room(1)
    )
    assert list(walked) == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_spool_gives_back_what_it_was_given(tmp_path, dtype):
    states = [
        torch.randn(n, 3, 4, generator=torch.Generator().manual_seed(n)).to(dtype)
        for n in (2, 5, 1)
    ]
    with engine.Spool(tmp_path, torch.device("cpu")) as spool:
        for state in states:
            spool.append(state)
        spool[1] = states[1].flip(0)
        assert len(spool) == 3
        assert torch.equal(spool[0], states[0])
        assert torch.equal(spool[1], states[1].flip(0))
        assert torch.equal(spool[2], states[2])
