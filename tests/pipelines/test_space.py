"""What a search chooses from, as the format it writes wants it."""

import pytest

from srcr.errors import InputError
from srcr.formats import get_format
from srcr.models.checkpoint import open_model
from srcr.pipelines.levels import space_for
from srcr.planning.space import SearchSpace
from srcr.plans.specs import QuantSpec
from srcr.testing import tiny_model


def test_gguf_wants_groups_of_32_and_scales_of_16_bits():
    pytest.importorskip("gguf")
    opened = open_model(tiny_model("llama", intermediate_size=64))
    space = space_for(SearchSpace(), get_format("gguf"), opened)
    assert space.quant == QuantSpec(group_size=32, scale_dtype="float16")
    own = SearchSpace(quant=QuantSpec(group_size=-1, scale_dtype="bfloat16"))
    assert space_for(own, get_format("gguf"), opened) == own


def test_other_formats_leave_it_as_it_is():
    opened = open_model(tiny_model("llama"))
    for name in ("compressed-tensors", "dense", "archive"):
        assert space_for(SearchSpace(), get_format(name), opened) == SearchSpace()


@pytest.mark.parametrize(
    ("family", "name", "quant", "message"),
    [
        ("llama", "gguf", QuantSpec(), "do not divide the 48 of"),
        ("llama", "gguf", QuantSpec(symmetric=False), "has zero-points"),
        ("gpt2", "compressed-tensors", QuantSpec(), "a Conv1D"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_before_the_work(family, name, quant, message):
    if name == "gguf":
        pytest.importorskip("gguf")
    opened = open_model(tiny_model(family))
    with pytest.raises(InputError, match=message):
        space_for(SearchSpace(quant=quant), get_format(name), opened)
