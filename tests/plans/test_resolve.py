"""Plans made explicit, and checked against the shapes of a model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srcr.errors import InputError
from srcr.plans.plan import CompressionPlan, LayerPlan, Recipe
from srcr.plans.resolve import (
    AUTO_GROUPS,
    check_plan,
    resolve_group_sizes,
    resolve_scale_dtype,
    uniform_plan,
)
from srcr.plans.specs import Override, PruneSpec, QuantSpec, SolverSpec

SHAPES = {"a": (8, 256), "b": (8, 80), "c": (4, 128)}


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
        "group size auto: of 3 layers 128 for 2, channel-wise for 1, whose width none divides"
    )


@given(widths=st.lists(st.integers(1, 1024), min_size=1, max_size=5))
def test_resolved_group_sizes_divide_the_width(widths):
    shapes = {str(i): (2, width) for i, width in enumerate(widths)}
    plan, _ = resolve_group_sizes(uniform_plan(shapes, Recipe(None, QuantSpec())), shapes)
    check_plan(plan, shapes)
    for layer, width in zip(plan.layers, widths, strict=True):
        assert layer.quant.group_size == next((g for g in AUTO_GROUPS if width % g == 0), -1)


def test_zero_points_get_one_group_size_for_all():
    shapes = {"a": (8, 256), "b": (8, 192), "c": (4, 128)}
    recipe = Recipe(None, QuantSpec(symmetric=False))
    plan, _ = resolve_group_sizes(uniform_plan(shapes, recipe), shapes)
    assert [layer.quant.group_size for layer in plan.layers] == [64] * 3
    plan, _ = resolve_group_sizes(uniform_plan(SHAPES, recipe), SHAPES)
    assert [layer.quant.group_size for layer in plan.layers] == [-1] * 3


def test_scales_get_the_precision_of_the_format():
    own = LayerPlan("b", None, QuantSpec(scale_dtype="bfloat16"))
    plan = CompressionPlan((LayerPlan("a", None, QuantSpec()), own, LayerPlan("c")))
    assert resolve_scale_dtype(plan, None) is plan
    layers = resolve_scale_dtype(plan, "float16").layers
    assert layers == (LayerPlan("a", None, QuantSpec(scale_dtype="float16")), *plan.layers[1:])


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
            "group size 64 does not divide the width 80 of b: use a divisor",
        ),
        (
            [LayerPlan("b", PruneSpec.of("wanda", 0, "1:3"))],
            "1:3 sparsity needs widths that 3 divides; b has 80",
        ),
    ],
)
def test_plans_that_do_not_fit(layers, message):
    with pytest.raises(InputError, match=message):
        check_plan(CompressionPlan(tuple(layers)), SHAPES)


class TestSomeLayers:
    """Targets, ignore and overrides."""

    def plan(self, **changes):
        recipe = Recipe(PruneSpec(sparsity=0.25), QuantSpec(num_bits=4), **changes)
        plan = uniform_plan(SHAPES, recipe, {"e": (9, 8), "head": (9, 8)}, ["vision"])
        return {layer.name: (layer.sparsity, layer.bits) for layer in plan.layers}, plan

    @pytest.mark.parametrize(
        ("changes", "left"),
        [
            ({"ignore": ["a"]}, "a"),
            ({"targets": ["re:[bc]"]}, "a"),
            ({"targets": ["b", "c"], "ignore": ["c"]}, "ac"),
            ({"ignore": ["head"]}, ""),
            ({"ignore": ["vision", "b"]}, "b"),
        ],
    )
    def test_layers_that_are_left_alone(self, changes, left):
        levels, _ = self.plan(**changes)
        assert levels == {n: (0.0, 16) if n in left else (0.25, 4) for n in SHAPES}

    @pytest.mark.parametrize("option", ["targets", "ignore", "overrides"])
    def test_a_pattern_without_a_layer_is_refused(self, option):
        patterns = {"*.x": Override(bits=3)} if option == "overrides" else ["*.x"]
        with pytest.raises(InputError, match=rf"{option} pattern '\*\.x' matches no layer"):
            self.plan(**{option: patterns})

    @pytest.mark.parametrize("option", ["targets", "overrides"])
    def test_only_linears_can_be_targeted(self, option):
        patterns = {"head": Override(bits=3)} if option == "overrides" else ["head"]
        with pytest.raises(InputError, match="matches no layer"):
            self.plan(**{option: patterns})

    def test_later_overrides_win(self):
        overrides = {"*": Override(bits=6, symmetric=False), "a": Override(sparsity=0, bits=8)}
        levels, plan = self.plan(overrides=overrides, ignore=["c"])
        assert levels == {"a": (0.0, 8), "b": (0.25, 6), "c": (0.0, 16)}
        assert not plan.by_name()["a"].quant.symmetric

    def test_nothing_left_is_refused(self):
        with pytest.raises(InputError, match="leave nothing to compress"):
            self.plan(ignore=["*"])
        _, plan = self.plan(ignore=["re:[abc]"], embeddings=QuantSpec(num_bits=8))
        assert [layer.name for layer in plan.embeddings] == ["e", "head"]

    def test_embeddings_are_quantized_but_for_what_is_ignored(self):
        assert self.plan()[1].embeddings is None
        quant = QuantSpec(num_bits=8)
        _, plan = self.plan(embeddings=quant, ignore=["e"], targets=["a"])
        assert plan.embeddings == (LayerPlan("head", None, quant),)
        tables = {"e": (9, 8), "head": (9, 8)}
        plan, note = resolve_group_sizes(plan, SHAPES, tables)
        assert plan.embeddings[0].quant.group_size == -1
        assert "channel-wise for 1" in note  # a has 128 columns twice
        check_plan(plan, SHAPES, tables)
        with pytest.raises(InputError, match="neither its input embedding nor its own output head"):
            check_plan(plan, SHAPES, {"e": (9, 8)})


@pytest.mark.parametrize(
    ("override", "prune", "quant"),
    [
        (Override(), "2:4", 4),
        (Override(sparsity=0), None, 4),
        (Override(sparsity=0.3), 0.3, 4),
        (Override(structure="6:8"), "6:8", 4),
        (Override(bits=16), "2:4", None),
        (Override(bits=3, group_size=32, quant_method="rtn"), "2:4", 3),
    ],
)
def test_what_an_override_changes(override, prune, quant):
    others = PruneSpec.of("wanda", 0, "2:4"), QuantSpec(num_bits=4, symmetric=False)
    spec, scheme = override.applied(*others)
    assert (scheme and scheme.num_bits) == quant
    assert scheme is None or not scheme.symmetric
    if prune is None:
        assert spec is None
    else:
        assert prune in (spec.mask_structure, spec.sparsity)
        assert spec.method == "wanda"
