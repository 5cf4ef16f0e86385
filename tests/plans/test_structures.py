"""What is said of structures that go, as a text, a mapping and a count."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srcr.errors import InputError
from srcr.plans.structures import StructureSpec, parse_structures, structure_spec
from srcr.serialize import from_dict, to_dict


def test_a_text_says_shares_and_counts() -> None:
    spec = parse_structures("channels=0.25, heads=1,layers=2")
    assert spec == StructureSpec(channels=0.25, heads=1, layers=2)
    assert from_dict(StructureSpec, to_dict(spec)) == spec
    assert structure_spec({"channels": 0.25, "heads": 1, "layers": 2}) == spec
    assert structure_spec(None) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows=0.5", "use channels, heads, layers"),
        ("channels", "neither a share nor a count"),
        ("channels=many", "neither a share nor a count"),
        ("channels=1.5", "a share above 0 and below 1"),
        ("channels=1.0", "a share above 0 and below 1"),
        ("channels=0", "a share above 0 and below 1"),
        ("channels=-2", "a share above 0 and below 1"),
        ("channels=0.0", "a share above 0 and below 1"),
        ("channels=nan", "neither a share nor a count"),
        ("heads=1,heads=2", "twice"),
        ("", "use channels, heads, layers"),
    ],
)
def test_what_is_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_structures(text)


def test_a_mapping_with_another_key_is_refused() -> None:
    with pytest.raises(InputError, match="'neurons'"):
        structure_spec({"neurons": 0.5})


@given(st.integers(2, 4096), st.floats(0.01, 0.99), st.sampled_from([1, 2, 32]))
def test_a_share_leaves_the_nearest_multiple(size: int, share: float, multiple: int) -> None:
    size = size * multiple
    spec = StructureSpec(channels=share)
    try:
        count = spec.count("channels", size, multiple)
    except InputError:
        assert min(share, 1 - share) * size < multiple  # none would go, or none stay
        return
    assert 0 < count < size
    assert (size - count) % multiple == 0
    assert abs(count - share * size) <= multiple / 2 + 1e-6


def test_a_count_is_exact_and_something_stays() -> None:
    assert StructureSpec(heads=2).count("heads", 3) == 2
    assert StructureSpec().count("heads", 3) == 0
    with pytest.raises(InputError, match="at least one must go and one stay"):
        StructureSpec(heads=3).count("heads", 3)
    with pytest.raises(InputError, match="leave it out"):
        StructureSpec(heads=0.5).count("heads", 1)
