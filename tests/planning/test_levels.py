import pytest

from srcr.errors import InputError
from srcr.models.topology import observe
from srcr.planning.levels import Level, Treatment, decisions, grid, size_of
from srcr.testing import tiny_model
from srcr.types import PruneSpec, QuantSpec


def test_a_level_counts_what_is_kept():
    assert Level(0.25, 4).cost(1000) == 3000
    assert Level(0.0, 16).cost(10) == 160
    assert str(Level(0.25, 4)) == "25%+4"


@pytest.mark.parametrize(("sparsity", "bits"), [(-0.1, 4), (1.0, 4), (0.5, 1), (0.5, 9), (0.5, 15)])
def test_levels_out_of_range(sparsity, bits):
    with pytest.raises(InputError, match="level"):
        Level(sparsity, bits)


def test_the_grid_is_sorted_by_cost_and_never_empty():
    levels = grid([0, 0.5], [2, 4])
    assert levels == (Level(0.5, 2), Level(0, 2), Level(0.5, 4), Level(0, 4))
    with pytest.raises(InputError, match="no levels"):
        grid([], [4])


def test_a_treatment_makes_plans():
    treatment = Treatment(PruneSpec("wanda"), QuantSpec("rtn", group_size=-1))
    layer = treatment.layer("x", Level(0.3, 5))
    assert (layer.prune.method, layer.sparsity) == ("wanda", 0.3)
    assert (layer.quant.method, layer.quant.num_bits, layer.quant.group_size) == ("rtn", 5, -1)
    assert treatment.layer("x", Level(0, 16)) == treatment.layer("x", Level(0, 16)).__class__("x")


def test_decision_units_are_what_engines_fuse():
    topology = observe(tiny_model("llama"))
    units = decisions(topology)
    assert [unit.label for unit in units[:2]] == [
        "model.layers.0.self_attn.q_proj/k_proj/v_proj", "model.layers.0.self_attn.o_proj",
    ]  # fmt: skip
    total = sum(rows * cols for rows, cols in topology.shapes.values())
    assert sum(size_of(unit, topology) for unit in units) == total
