import pytest
import torch

from srcr.data.specs import Calibration
from srcr.errors import InputError
from srcr.models.checkpoint import open_model
from srcr.models.matrices import read_matrix
from srcr.models.topology import LinearGroup
from srcr.numerics.hessian import LayerStatistics
from srcr.pipelines.options import RunOptions
from srcr.pipelines.sensitivity import sensitivity
from srcr.planning.context import load_splits
from srcr.planning.database import build
from srcr.planning.space import SearchSpace
from srcr.planning.specs import Resources
from srcr.plans.specs import CompressionLevel, QuantSpec, SolverSpec
from srcr.records.sensitivity import GroupLosses, LevelLoss, SensitivityTable
from srcr.records.text import TextRecord
from srcr.serialize import from_dict, to_dict
from srcr.solver.problem import LayerProblem
from srcr.solver.solve import solve
from srcr.testing import save_tiny_model, tiny_model

LEVELS = (CompressionLevel(0.5, 3), CompressionLevel(0, 3), CompressionLevel(0.25, 5))
SPACE = SearchSpace(LEVELS, quant=QuantSpec(group_size=-1))
DATA = Calibration("self", 8, 24)
QUIET = RunOptions(quiet=True)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return open_model(save_tiny_model(tmp_path_factory.mktemp("base"), "llama"))


@pytest.fixture(scope="module")
def table(opened):
    return sensitivity(opened, SPACE, DATA, probes=3, options=QUIET)


def test_every_group_at_every_level(table):
    assert len(table.groups) == 8
    assert table.levels == LEVELS
    assert all(x.error > 0 and x.kl is not None for group in table.groups for x in group.losses)
    assert from_dict(SensitivityTable, to_dict(table)) == table


def test_errors_and_kl_are_those_of_that_group_alone(opened, table):
    """Against the slow way: the whole model, with one linear compressed on the dense model's inputs."""
    base = opened.loaded()
    splits = load_splits(DATA, opened, opened.parameters, 0)
    name = "model.layers.1.mlp.down_proj"
    inputs = []
    handle = base.get_submodule(name).register_forward_pre_hook(
        lambda _, args: inputs.append(args[0])
    )
    base(splits.calibration.input_ids)
    handle.remove()
    X = torch.cat(inputs).reshape(-1, 48)
    ref = opened.topology.matrices[name]
    W = read_matrix(base, ref).clone()
    plans = SPACE.group_plans(LinearGroup((name,)), LEVELS[0], opened.topology.shapes)
    once = SolverSpec(descent_rounds=1)
    problem = LayerProblem({name: W}, plans, LayerStatistics(X.T @ X), once, torch.float32)
    weight = solve(problem)[name]
    other = tiny_model("llama")
    other.load_state_dict(base.state_dict())
    read_matrix(other, ref).data.copy_(weight.dequantize())
    ids = splits.search.input_ids
    with torch.no_grad():
        p, q = (m(ids).logits[:, :-1].log_softmax(-1) for m in (base, other))
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    row = next(group for group in table.groups if group.names == (name,))
    loss = next(x for x in row.losses if x.level == LEVELS[0])
    assert loss.kl == pytest.approx(kl, rel=1e-3)
    assert loss.error == pytest.approx(weight.error, rel=1e-3)


def test_a_model_in_memory_gives_the_same(opened, table):
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again = sensitivity(model, SPACE, DATA, probes=3, options=QUIET)
    for group, expected in zip(again.groups, table.groups, strict=True):
        assert group == expected
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_database_is_built_once(opened, table, tmp_path, monkeypatch):
    resources = Resources(database=tmp_path / "levels")
    first = sensitivity(opened, SPACE, DATA, 0, resources, QUIET)
    monkeypatch.setattr(build, "solve", None)  # none is made again
    again = sensitivity(opened, SPACE, DATA, 0, resources, QUIET)
    assert first.groups == again.groups
    for group, measured in zip(again.groups, table.groups, strict=True):
        assert [x.error for x in group.losses] == [x.error for x in measured.losses]
        assert {x.kl for x in group.losses} == {None}


def test_a_database_may_be_limited(opened):
    with pytest.raises(InputError, match="--database-limit"):
        sensitivity(opened, SPACE, DATA, 0, Resources(database_limit=100), QUIET)


def test_a_model_in_memory_is_not_for_other_machines():
    with pytest.raises(InputError, match="--ray local: the workers open the model by its folder"):
        sensitivity(tiny_model("llama"), SPACE, DATA, 0, Resources(ray="local"), QUIET)


def test_what_was_not_measured_is_predicted_from_what_was():
    def group(name, *losses):
        return GroupLosses(
            (name,), 10, tuple(LevelLoss(0, b, error, kl) for b, error, kl in losses)
        )

    groups = (
        group("a", (2, 1.0, 0.4), (3, 0.1, None), (4, 0.01, 0.004)),
        group("b", (2, 2.0, None), (3, 0.5, None), (4, 0.1, None)),
    )
    predicted = SensitivityTable("m", "0", TextRecord("text", 1, 1, "0"), groups).predicted()
    assert [loss for _, loss in predicted[0]] == pytest.approx([0.4, 0.04, 0.004])
    assert [loss for _, loss in predicted[1]] == pytest.approx([0.8, 0.2, 0.04])
