"""Settings by the command line's names become a recipe, and come back."""

from hypothesis import given
from hypothesis import strategies as st

from srcr.plans.settings import recipe_of, settings_of
from srcr.serialize import from_dict, to_dict

amounts = st.sampled_from([0.25, 2])
settings = st.fixed_dictionaries(
    {},
    optional={
        "sparsity": st.sampled_from([0.0, 0.25, 0.5]),
        "bits": st.sampled_from([2, 4, 8, 16]),
        "group_size": st.sampled_from(["auto", -1, 32]),
        "symmetric": st.booleans(),
        "prune_method": st.just("wanda"),
        "quant_method": st.just("rtn"),
        "mode": st.just("sequential-a"),
        "dampening_frac": st.just(0.02),
        "dense_targets": st.booleans(),
        "expert_prior": st.floats(0.1, 1e6),
        "expert_gates": st.booleans(),
        "descent_rounds": st.integers(0, 3),
        "targets": st.just(["*.mlp.*"]),
        "ignore": st.just("re:.*k_proj"),
        "overrides": st.just({"*.down_proj": {"bits": 6}}),
        "embeddings": st.sampled_from([8, 16]),
        "remove": st.fixed_dictionaries({"channels": amounts}, optional={"layers": st.just(1)}),
    },
)


@given(settings)
def test_they_make_the_same_recipe_again(given_settings):
    recipe = recipe_of(given_settings)
    assert recipe_of(settings_of(recipe)) == recipe


def test_a_pattern_of_zeros_comes_back():
    recipe = recipe_of({"structure": "2:4", "bits": 16})
    assert recipe_of(settings_of(recipe)) == recipe
    assert settings_of(recipe)["structure"] == "2:4"


def test_they_are_plain_types():
    recipe = recipe_of({"overrides": {"*.q_proj": {"bits": 6}}, "remove": "channels=0.25"})
    plain = to_dict(settings_of(recipe))
    assert recipe_of(from_dict(dict, plain, "a file")) == recipe
