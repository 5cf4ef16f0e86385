"""Plans made explicit, and checked against the shapes of a model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srcr.errors import InputError
from srcr.plans.plan import CompressionPlan, LayerPlan, Recipe
from srcr.plans.resolve import AUTO_GROUP, check_plan, resolve_group_sizes, uniform_plan
from srcr.plans.specs import PruneSpec, QuantSpec, SolverSpec

SHAPES = {"a": (8, 256), "b": (8, 96), "c": (4, 128)}


def test_a_recipe_becomes_the_same_for_every_layer():
    recipe = Recipe(PruneSpec(), QuantSpec(num_bits=3), SolverSpec("sequential-a"))
    plan = uniform_plan(SHAPES, recipe)
    assert [layer.name for layer in plan.layers] == list(SHAPES)
    assert {layer.prune for layer in plan.layers} == {recipe.prune}
    assert {layer.quant for layer in plan.layers} == {recipe.quant}
    assert plan.solver == recipe.solver


def test_group_sizes_become_explicit_and_are_told():
    plan, note = resolve_group_sizes(uniform_plan(SHAPES, Recipe(None, QuantSpec())), SHAPES)
    assert [layer.quant.group_size for layer in plan.layers] == [128, -1, 128]
    assert note == (
        "group size auto: 128 for 2 of 3 layers, channel-wise for the 1 whose width it does not divide"
    )


@given(widths=st.lists(st.integers(1, 1024), min_size=1, max_size=5))
def test_resolved_group_sizes_divide_the_width(widths):
    shapes = {str(i): (2, width) for i, width in enumerate(widths)}
    plan, _ = resolve_group_sizes(uniform_plan(shapes, Recipe(None, QuantSpec())), shapes)
    check_plan(plan, shapes)
    for layer, width in zip(plan.layers, widths, strict=True):
        assert layer.quant.group_size == (AUTO_GROUP if width % AUTO_GROUP == 0 else -1)


def test_what_is_explicit_stays_as_it_is():
    plan = CompressionPlan((LayerPlan("a", None, QuantSpec(group_size=32)), LayerPlan("b")))
    assert resolve_group_sizes(plan, SHAPES) == (plan, None)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([LayerPlan("x")], "names 'x', which is no linear layer .* called like 'a'"),
        ([LayerPlan("a"), LayerPlan("a")], "names 'a' twice"),
        (
            [LayerPlan("b", None, QuantSpec(group_size=64))],
            "group size 64 does not divide the width 96 of b: use a divisor",
        ),
        (
            [LayerPlan("b", PruneSpec.of("wanda", 0, "1:5"))],
            "1:5 sparsity needs widths that 5 divides; b has 96",
        ),
    ],
)
def test_plans_that_do_not_fit(layers, message):
    with pytest.raises(InputError, match=message):
        check_plan(CompressionPlan(tuple(layers)), SHAPES)
