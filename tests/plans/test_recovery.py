"""How long training goes on, and what is refused."""

import pytest

from srcr.errors import InputError
from srcr.plans.recovery import RecoverySpec, parse_duration
from srcr.serialize import from_dict, to_dict


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10min", {"minutes": 10.0}),
        ("90 s", {"minutes": 1.5}),
        (" 1.5h ", {"minutes": 90.0}),
        ("500steps", {"steps": 500}),
    ],
)
def test_durations(text, expected):
    assert parse_duration(text) == expected
    RecoverySpec(**expected)


@pytest.mark.parametrize("text", ["", "10", "min", "-1min", "1.5steps", "10 parsecs", "1e3s"])
def test_what_is_no_duration_is_named(text):
    with pytest.raises(InputError, match="duration"):
        parse_duration(text)


def test_a_spec_survives_its_json_and_unknown_keys_are_named():
    spec = RecoverySpec("both", minutes=2.5, train="scales", loss="cakld", lr=2e-3)
    assert from_dict(RecoverySpec, to_dict(spec)) == spec
    for wrong in ({"stage": "end"}, {"train": "all"}, {"loss": "mse"}, {"lrate": 1}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            from_dict(RecoverySpec, to_dict(spec) | wrong)
