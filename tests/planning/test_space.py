import pytest

from srcr.errors import InputError
from srcr.models.checkpoint import open_model
from srcr.planning.space import SearchSpace, level_grid, spread_levels
from srcr.plans.plan import LayerPlan
from srcr.plans.specs import CompressionLevel, PruneSpec, QuantSpec, SolverSpec
from srcr.testing import tiny_model

LEVELS = (CompressionLevel(0.5, 3), CompressionLevel(0, 3), CompressionLevel(0.25, 5))


def test_a_level_counts_what_is_kept():
    assert CompressionLevel(0.25, 4).cost(1000) == 3000
    assert CompressionLevel(0.0, 16).cost(10) == 160
    assert str(CompressionLevel(0.25, 4)) == "25%+4"


@pytest.mark.parametrize(("sparsity", "bits"), [(-0.1, 4), (1.0, 4), (0.5, 1), (0.5, 9), (0.5, 15)])
def test_levels_out_of_range(sparsity, bits):
    with pytest.raises(InputError, match="level"):
        CompressionLevel(sparsity, bits)


def test_the_grid_is_sorted_by_cost_and_never_empty():
    levels = level_grid([0, 0.5], [2, 4])
    assert levels == tuple(CompressionLevel(*x) for x in [(0.5, 2), (0, 2), (0.5, 4), (0, 4)])
    with pytest.raises(InputError, match="no levels"):
        level_grid([], [4])


def test_probes_are_spread_over_the_levels():
    assert spread_levels(LEVELS, 2) == [LEVELS[0], LEVELS[2]]
    assert spread_levels(LEVELS, 1) == [LEVELS[1]]
    assert spread_levels(LEVELS, 0) == []
    assert spread_levels(LEVELS, 9) == list(LEVELS)
    with pytest.raises(InputError, match="probes -1"):
        spread_levels(LEVELS, -1)


def test_a_space_makes_plans():
    space = SearchSpace(LEVELS, PruneSpec("wanda"), QuantSpec("rtn", 2, 64, symmetric=False))
    shapes = {"x": (8, 128), "y": (8, 64)}
    layer = space.layer("x", CompressionLevel(0.3, 5), shapes)
    assert layer == LayerPlan(
        "x", PruneSpec("wanda", 0.3), QuantSpec("rtn", 5, 64, symmetric=False)
    )
    assert space.layer("x", CompressionLevel(0, 16), shapes) == LayerPlan("x")
    topology = tiny_topology()
    plan = space.plan(dict.fromkeys(topology.shapes, LEVELS[1]), topology, 7)
    assert [each.name for each in plan.layers] == list(topology.shapes)
    assert (plan.seed, plan.solver) == (7, space.solver)


def test_group_sizes_are_made_explicit():
    space = SearchSpace(LEVELS, quant=QuantSpec(group_size="auto"))
    shapes = {"x": (8, 256), "y": (8, 96)}
    sizes = [space.layer(name, LEVELS[1], shapes).quant.group_size for name in shapes]
    assert sizes == [128, 32]


def test_levels_are_drafts():
    assert SearchSpace().draft().descent_rounds == 1
    assert SearchSpace(solver=SolverSpec(descent_rounds=0)).draft().descent_rounds == 0
    assert SearchSpace(draft_rounds=3).draft().descent_rounds == SolverSpec().descent_rounds


def tiny_topology():
    return open_model(tiny_model("llama")).topology


class TestPatterns:
    def test_groups_that_get_a_level(self):
        topology = tiny_topology()
        assert SearchSpace().groups(topology) == topology.groups()
        mlp = SearchSpace(targets=("*.mlp.*",), ignore=("model.layers.0.*",)).groups(topology)
        assert [group.names for group in mlp] == [
            ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"),
            ("model.layers.1.mlp.down_proj",),
        ]

    @pytest.mark.parametrize(
        ("patterns", "message"),
        [
            ({"ignore": ("*.k_proj",)}, "choose a part of model.layers.0.self_attn.q_proj"),
            ({"ignore": ("*.k_prj",)}, "ignore pattern '.*' matches no layer"),
            ({"targets": ("lm_head",)}, "targets pattern 'lm_head' matches no layer"),
            ({"ignore": ("*",)}, "leave nothing to compress"),
        ],
    )
    def test_patterns_that_cannot_be(self, patterns, message):
        with pytest.raises(InputError, match=message):
            SearchSpace(**patterns).groups(tiny_topology())

    def test_a_head_may_be_ignored_that_is_tied(self):
        topology = open_model(tiny_model("llama", tie_word_embeddings=True)).topology
        assert SearchSpace(ignore=("lm_head",)).groups(topology) == topology.groups()

    def test_embeddings_have_the_super_blocks_of_a_format(self):
        topology = open_model(tiny_model("llama", hidden_size=256)).topology
        space = SearchSpace(super_blocks={6: (16, 8)}, embeddings=QuantSpec(num_bits=6))
        for layer in space.embedding_plans(topology):
            assert (layer.quant.group_size, layer.quant.scale_bits) == (16, 8)

    def test_what_has_no_level_stays_as_it_is(self):
        topology = tiny_topology()
        space = SearchSpace(
            LEVELS, quant=QuantSpec(group_size=-1), ignore=("*.0.*", "lm_head"),
            embeddings=QuantSpec(num_bits=8, group_size="auto", actorder=None),
        )  # fmt: skip
        names = [name for group in space.groups(topology) for name in group.names]
        plan = space.plan(dict.fromkeys(names, LEVELS[1]), topology, 0)
        untouched = [each.name for each in plan.layers if each == LayerPlan(each.name)]
        assert untouched == [name for name in topology.shapes if ".0." in name]
        assert [each.name for each in plan.embeddings] == ["model.embed_tokens"]
        assert plan.embeddings[0].quant.group_size == 32
