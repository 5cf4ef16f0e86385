import random

import pytest

from srcr.data.specs import Calibration
from srcr.errors import InputError
from srcr.models.checkpoint import open_model
from srcr.pipelines.compress import compress
from srcr.pipelines.options import Output, RunOptions
from srcr.pipelines.plan import plan
from srcr.planning.costs import SizeBudget
from srcr.planning.plans import allocated_plan
from srcr.planning.space import SearchSpace
from srcr.plans.plan import CompressionPlan, Target
from srcr.plans.specs import CompressionLevel, QuantSpec
from srcr.records.sensitivity import GroupLosses, LevelLoss, SensitivityTable
from srcr.records.text import TextRecord
from srcr.serialize import from_dict, from_yaml, to_dict, to_yaml
from srcr.testing import save_tiny_model, tiny_model

pytestmark = pytest.mark.slow

SPACE = SearchSpace(quant=QuantSpec(group_size=-1))
QUIET = RunOptions(quiet=True)
DATA = Calibration("self", 8, 24)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = save_tiny_model(
        tmp_path_factory.mktemp("base"), "llama", hidden_size=64, intermediate_size=96, head_dim=16,
        num_hidden_layers=4,
    )  # fmt: skip
    return open_model(folder)


def table(opened, weight=lambda i: i + 1):
    """Losses as linears have them: fourfold less for every bit, more for every zero, and each group's own
    ``weight`` by its number."""
    groups = tuple(
        GroupLosses(
            group.names,
            opened.topology.group_size(group),
            tuple(
                LevelLoss(
                    level.sparsity,
                    level.num_bits,
                    weight(i) * (4.0**-level.num_bits + level.sparsity**3 / 50),
                )
                for level in SPACE.levels
            ),
        )
        for i, group in enumerate(opened.topology.groups())
    )
    text = TextRecord("text", 1, 1, "0")
    return SensitivityTable("base", opened.sha256, text, groups, quant=SPACE.quant)


def allocated(opened, target, losses, format_name="dense", seed=0):
    budget = SizeBudget.of(target, opened.blockwise, SPACE, format_name)
    return allocated_plan(losses.predicted(), budget, target, seed)


@pytest.mark.parametrize("kind", ["tcr", "stored", "loaded"])
def test_twenty_random_budgets_are_met_from_below(kind, opened, tmp_path):
    losses = table(opened)
    rng = random.Random(0)
    for i in range(20):
        if kind == "tcr":
            target = Target(tcr=rng.uniform(0.55, 0.93))
            shapes = opened.topology.shapes
            total = 16 * sum(rows * cols for rows, cols in shapes.values())
            kept = 0
            for layer in allocated(opened, target, losses).layers:
                rows, cols = shapes[layer.name]
                kept += (rows * cols - round(layer.sparsity * rows * cols)) * layer.bits
            assert (1 - target.tcr) * 0.995 * total <= kept <= (1 - target.tcr) * total
            continue
        size = rng.randint(100_000, 170_000)
        target = Target(stored_bytes=size) if kind == "stored" else Target(loaded_bytes=size)
        chosen = allocated(opened, target, losses, "compressed-tensors")
        budget = SizeBudget.of(target, opened.blockwise, SPACE, "compressed-tensors")
        levels = {e.name: CompressionLevel(e.sparsity, e.bits) for e in chosen.layers}
        cost = budget.fixed + sum(budget.cost(name, level) for name, level in levels.items())
        assert 0.995 * size <= cost <= size
        if i % 10 == 0:  # written for real
            out = Output(tmp_path / f"out{i}", "compressed-tensors")
            rates = compress(opened, out, chosen, Calibration("self", 2, 16), QUIET).rates
            written = rates.stored_bytes if kind == "stored" else rates.loaded_bytes
            assert 0.995 * size <= written <= size


def test_fused_layers_share_their_width(opened):
    chosen = allocated(opened, Target(tcr=0.8), table(opened)).by_name()
    for group in opened.topology.groups():
        assert len({chosen[name].bits for name in group.names}) == 1
    assert len({layer.bits for layer in chosen.values()}) > 1


@pytest.mark.parametrize("first_loses_more", [True, False])
def test_what_loses_more_gets_more(first_loses_more, opened):
    last = len(opened.topology.groups()) - 1
    losses = table(opened, lambda i: 100.0 ** ((last - i if first_loses_more else i) / last))
    chosen = allocated(opened, Target(tcr=0.8), losses).by_name()
    first, final = (
        (1 - chosen[name].sparsity) * chosen[name].bits
        for name in (f"model.layers.{i}.mlp.down_proj" for i in (0, 3))
    )
    assert first > final + 1 if first_loses_more else first < final - 1


def test_a_plan_can_be_read_edited_and_fed_back(opened, tmp_path):
    target = Target(tcr=0.8)
    chosen = allocated(opened, target, table(opened), seed=3)
    (tmp_path / "plan.yaml").write_text(to_yaml(chosen))
    assert from_yaml(CompressionPlan, tmp_path / "plan.yaml") == chosen
    assert (chosen.target, chosen.seed) == (target, 3)


@pytest.mark.parametrize(
    "target",
    [Target(tcr=0.97), Target(tcr=0.1), Target(stored_bytes=1000), Target(loaded_bytes=10**9)],
)
def test_budgets_out_of_reach_are_refused_with_the_range(target, opened):
    with pytest.raises(InputError, match=r"cannot be met: .* smallest plan and .* the largest"):
        plan(opened, target, SPACE, DATA, options=QUIET)


def test_a_table_belongs_to_its_model(opened):
    other = tiny_model("llama", seed=1)
    with pytest.raises(InputError, match=r"another model \(base\)"):
        plan(other, Target(tcr=0.8), table(opened), options=QUIET)
    chosen = plan(opened, Target(tcr=0.8), table(opened), options=QUIET)
    assert chosen == allocated(opened, Target(tcr=0.8), table(opened))


def test_a_table_of_an_earlier_version_is_read(opened):
    new = to_dict(table(opened))
    old = {key: new[key] for key in ("base", "base_sha256", "calibration", "seconds")} | {
        "treatment": {"prune": new["prune"], "quant": new["quant"]},
        "sweep": new["solver"],
        "units": new["groups"],
    }
    old["treatment"]["quant"]["symmetric"] = False
    losses = from_dict(SensitivityTable, old)
    chosen = plan(opened, Target(tcr=0.8), losses, options=QUIET)
    assert {layer.quant.symmetric for layer in chosen.layers} == {False}
    assert {layer.quant.group_size for layer in chosen.layers} == {-1}


@pytest.mark.parametrize("in_memory", [False, True])
def test_without_a_table_one_is_made(in_memory, opened):
    levels = (CompressionLevel(0, 3), CompressionLevel(0.25, 4), CompressionLevel(0, 5))
    space = SearchSpace(levels, quant=SPACE.quant)
    model = opened.loaded() if in_memory else opened.folder
    chosen = plan(model, Target(tcr=0.78), space, DATA, options=QUIET)
    assert {layer.name for layer in chosen.layers} == set(opened.topology.shapes)
    assert {layer.bits for layer in chosen.layers} <= {3, 4, 5}
