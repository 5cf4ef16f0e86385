"""Patterns that choose layers by name."""

import pytest

from srcr.errors import InputError
from srcr.plans.patterns import check_patterns, matches, matches_any

DOWN, Q = "model.layers.0.mlp.down_proj", "model.layers.11.self_attn.q_proj"


@pytest.mark.parametrize(
    ("pattern", "chosen"),
    [
        ("*.down_proj", {DOWN}),
        ("model.layers.0.*", {DOWN}),
        ("*", {DOWN, Q}),
        (Q, {Q}),
        ("model.layers.?.*", {DOWN}),
        ("mlp.down_proj", set()),
        (r"re:.*\.(q|k|v)_proj$", {Q}),
        (r"re:model\.layers\.1", {Q}),
        ("re:layers", set()),  # from the beginning, as in compressed-tensors
    ],
)
def test_globs_and_regular_expressions(pattern, chosen):
    assert {name for name in (DOWN, Q) if matches(name, pattern)} == chosen
    assert {name for name in (DOWN, Q) if matches_any(name, ["nothing", pattern])} == chosen


def test_what_matches_nothing_is_named_with_what_is_near():
    check_patterns("ignore", ["*.down_proj", Q], [DOWN, Q])
    with pytest.raises(
        InputError, match=r"ignore pattern '\*\.dwn_proj' .*nearest are .*down_proj"
    ):
        check_patterns("ignore", [Q, "*.dwn_proj"], [DOWN, Q])
    with pytest.raises(InputError, match=DOWN):
        check_patterns("targets", ["0"], [DOWN, Q])


def test_no_regular_expression():
    with pytest.raises(InputError, match=r"'re:\(' is no regular expression"):
        matches(Q, "re:(")
