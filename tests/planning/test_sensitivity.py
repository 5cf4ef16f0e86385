import pytest
import torch

import srcr
from srcr import Calibration, Level, QuantSpec, Resources, Space, Treatment
from srcr.errors import InputError
from srcr.methods.joint import compress_unit
from srcr.models.topology import linear_weight, observe
from srcr.planning.sensitivity import Loss, Table, UnitLosses, subset
from srcr.testing import save_tiny_model, tiny_model
from srcr.types import LayerStats, SweepSpec, from_dict, to_dict

LEVELS = (Level(0.5, 3), Level(0, 3), Level(0.25, 5))
SPACE = Space(LEVELS, Treatment(quant=QuantSpec(group_size=-1)))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("base"), "llama")
    table = srcr.sensitivity(folder, SPACE, Calibration("self", 8, 24), probes=3, quiet=True)
    return folder, table


def test_every_unit_at_every_level(found):
    _, table = found
    assert len(table.units) == 8
    assert table.levels == LEVELS
    assert all(x.error > 0 and x.kl is not None for unit in table.units for x in unit.losses)
    assert from_dict(Table, to_dict(table)) == table


def test_errors_and_kl_are_those_of_that_unit_alone(found):
    """Against the slow way: the whole model, with one linear compressed on the dense model's inputs."""
    folder, table = found
    from srcr.models.load import load_model
    from srcr.planning.texts import load_texts

    base = load_model(folder)
    texts = load_texts(Calibration("self", 8, 24), base, folder, 0)
    name = "model.layers.1.mlp.down_proj"
    inputs = []
    module = base.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    base(texts.calibration.input_ids)
    handle.remove()
    X = torch.cat(inputs).reshape(-1, 48)
    W = linear_weight(module).clone()
    plans = SPACE.unit_plans(srcr.planning.levels.Decision((name,)), LEVELS[0], observe(base))
    once = SweepSpec(descent_rounds=1)
    made = compress_unit({name: W}, LayerStats(X.T @ X, len(X)), plans, once, torch.float32)
    other = tiny_model("llama")
    other.load_state_dict(base.state_dict())
    linear_weight(other.get_submodule(name)).data.copy_(made[name].dequantize())
    ids = texts.search.input_ids
    with torch.no_grad():
        p, q = (m(ids).logits[:, :-1].log_softmax(-1) for m in (base, other))
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    row = next(unit for unit in table.units if unit.names == (name,))
    loss = next(x for x in row.losses if x.level == LEVELS[0])
    assert loss.kl == pytest.approx(kl, rel=1e-3)
    assert loss.error == pytest.approx(made[name].error, rel=1e-3)


def test_a_database_is_built_once(found, tmp_path, monkeypatch):
    folder, table = found
    resources = Resources(database=tmp_path / "levels")
    data = Calibration("self", 8, 24)
    assert srcr.sensitivity(folder, SPACE, data, 0, resources, quiet=True).levels == LEVELS
    monkeypatch.setattr("srcr.planning.building.compress_unit", None)  # none is made again
    again = srcr.sensitivity(folder, SPACE, data, 0, resources, quiet=True)
    for one, other in zip(table.units, again.units, strict=True):
        assert [x.error for x in one.losses] == [x.error for x in other.losses]
        assert {x.kl for x in other.losses} == {None}


def test_a_database_may_be_limited(found):
    folder, _ = found
    with pytest.raises(InputError, match="--database-limit"):
        srcr.sensitivity(
            folder, SPACE, Calibration("self", 8, 24), 0, Resources(database_limit=100), quiet=True
        )


def test_what_was_not_measured_is_predicted_from_what_was():
    def unit(name, *losses):
        return UnitLosses((name,), 10, tuple(Loss(0, b, error, kl) for b, error, kl in losses))

    units = (
        unit("a", (2, 1.0, 0.4), (3, 0.1, None), (4, 0.01, 0.004)),
        unit("b", (2, 2.0, None), (3, 0.5, None), (4, 0.1, None)),
    )
    predicted = Table("m", "0", {}, Treatment(), SweepSpec(), units).predicted()
    assert [loss for _, loss in predicted[0]] == pytest.approx([0.4, 0.04, 0.004])
    assert [loss for _, loss in predicted[1]] == pytest.approx([0.8, 0.2, 0.04])


def test_probes_are_spread_over_the_levels():
    assert subset(LEVELS, 2) == [LEVELS[0], LEVELS[2]]
    assert subset(LEVELS, 1) == [LEVELS[1]]
    assert subset(LEVELS, 0) == []
    assert subset(LEVELS, 9) == list(LEVELS)
    with pytest.raises(InputError, match="probes -1"):
        subset(LEVELS, -1)
