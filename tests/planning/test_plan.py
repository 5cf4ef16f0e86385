import random

import pytest

import srcr
from srcr import Calibration, Level, Output, QuantSpec, Space, Target, Treatment
from srcr.errors import InputError
from srcr.formats import get_format
from srcr.models.weights import open_weights
from srcr.planning.levels import decisions, grid, size_of
from srcr.planning.plan import allocated
from srcr.planning.sensitivity import Loss, Table, UnitLosses
from srcr.testing import save_tiny_model
from srcr.types import PruneSpec, SweepSpec, from_yaml, to_yaml

SPACE = Space(grid(), Treatment(PruneSpec(), QuantSpec(group_size=-1)))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = save_tiny_model(
        tmp_path_factory.mktemp("base"), "llama", hidden_size=64, intermediate_size=96, head_dim=16,
        num_hidden_layers=4,
    )  # fmt: skip
    return folder, open_weights(folder)


def table(source, sha256="0"):
    """Losses as layers have them: fourfold less for every bit, more for every zero."""
    units = tuple(
        UnitLosses(
            unit.names,
            size_of(unit, source.topology),
            tuple(
                Loss(x.sparsity, x.num_bits, (i + 1) * (4.0**-x.num_bits + x.sparsity**3 / 50))
                for x in SPACE.levels
            ),
        )
        for i, unit in enumerate(decisions(source.topology))
    )
    return Table("base", sha256, {}, SPACE.treatment, SPACE.sweep, units)


@pytest.mark.parametrize("kind", ["tcr", "stored", "loaded"])
def test_twenty_random_budgets_are_met_from_below(kind, base, tmp_path):
    folder, source = base
    losses = table(source).predicted()
    rng = random.Random(0)
    for i in range(20):
        if kind == "tcr":
            target = Target(tcr=rng.uniform(0.55, 0.93))
            plan = allocated(source, target, SPACE, "dense", losses, 0)
            shapes = source.topology.shapes
            total = 16 * sum(rows * cols for rows, cols in shapes.values())
            kept = 0
            for layer in plan.layers:
                rows, cols = shapes[layer.name]
                kept += (rows * cols - round(layer.sparsity * rows * cols)) * layer.bits
            assert (1 - target.tcr) * 0.995 * total <= kept <= (1 - target.tcr) * total
            continue
        size = rng.randint(100_000, 170_000)
        target = Target(stored_bytes=size) if kind == "stored" else Target(loaded_bytes=size)
        plan = allocated(source, target, SPACE, "compressed-tensors", losses, 0)
        if i % 7 == 0:  # written for real
            out = Output(tmp_path / f"out{i}", "compressed-tensors")
            rates = srcr.compress(folder, plan, Calibration("self", 2, 16), out, quiet=True).rates
            real = rates.stored_bytes if kind == "stored" else rates.loaded_bytes
            assert 0.995 * size <= real <= size


def test_fused_layers_share_their_width(base):
    _, source = base
    plan = allocated(
        source, Target(tcr=0.8), SPACE, "compressed-tensors", table(source).predicted(), 0
    )
    get_format("compressed-tensors").check(plan, source.topology)
    assert len({layer.bits for layer in plan.layers}) > 1


def test_what_loses_more_gets_more(base):
    _, source = base
    plan = allocated(
        source, Target(tcr=0.8), SPACE, "dense", table(source).predicted(), 0
    ).by_name()
    same = [f"model.layers.{i}.mlp.down_proj" for i in (0, 3)]
    first, last = ((1 - plan[n].sparsity) * plan[n].bits for n in same)
    assert first <= last


def test_a_plan_can_be_read_edited_and_fed_back(base, tmp_path):
    _, source = base
    target = Target(tcr=0.8)
    plan = allocated(source, target, SPACE, "dense", table(source).predicted(), 3)
    (tmp_path / "plan.yaml").write_text(to_yaml(plan))
    assert from_yaml(type(plan), tmp_path / "plan.yaml") == plan
    assert plan.target == target
    assert plan.seed == 3


@pytest.mark.parametrize(
    "target",
    [Target(tcr=0.97), Target(tcr=0.1), Target(stored_bytes=1000), Target(loaded_bytes=10**9)],
)
def test_budgets_out_of_reach_are_refused_with_the_range(target, base):
    folder, _ = base
    with pytest.raises(InputError, match=r"cannot be met: .* smallest plan and .* the largest"):
        srcr.plan(folder, target, SPACE, Calibration("self", 8, 24), quiet=True)


def test_a_table_belongs_to_its_model(base, tmp_path):
    folder, source = base
    with pytest.raises(InputError, match="another model"):
        srcr.plan(folder, Target(tcr=0.8), SPACE, Calibration(), table(source), quiet=True)


def test_without_a_table_one_is_made(base):
    folder, source = base
    space = Space((Level(0, 3), Level(0.25, 4), Level(0, 5)), SPACE.treatment, SweepSpec())
    plan = srcr.plan(folder, Target(tcr=0.78), space, Calibration("self", 8, 24), quiet=True)
    assert {layer.name for layer in plan.layers} == set(source.topology.shapes)
