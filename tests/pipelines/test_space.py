"""What a search chooses from, as the format it writes wants it."""

import pytest

from srcr.errors import InputError
from srcr.formats import get_format
from srcr.models.checkpoint import open_model
from srcr.pipelines.levels import space_for
from srcr.planning.space import SearchSpace
from srcr.plans.specs import CompressionLevel, QuantSpec
from srcr.testing import tiny_model


def test_gguf_wants_groups_of_32_and_scales_of_16_bits():
    pytest.importorskip("gguf")
    opened = open_model(tiny_model("llama", intermediate_size=64))
    space = space_for(SearchSpace(), get_format("gguf"), opened)
    assert space.quant == QuantSpec(scale_dtype="float16")
    name = "model.layers.0.mlp.down_proj"
    layer = space.layer(name, CompressionLevel(0.25, 3), opened.topology.shapes)
    assert layer.quant == QuantSpec(num_bits=3, group_size=32, scale_dtype="float16")
    own = SearchSpace(quant=QuantSpec(group_size=-1, scale_dtype="bfloat16"))
    assert space_for(own, get_format("gguf"), opened).quant == own.quant


def test_gguf_wants_super_blocks_where_they_divide():
    pytest.importorskip("gguf")
    opened = open_model(tiny_model("llama", hidden_size=64, intermediate_size=256))
    space = space_for(SearchSpace(), get_format("gguf"), opened)
    shapes = opened.topology.shapes
    plans = {
        (role, bits): space.layer(
            f"model.layers.0.mlp.{role}_proj", CompressionLevel(0, bits), shapes
        )
        for role in ("down", "up")
        for bits in (3, 4, 6)
    }
    sizes = {key: (plan.quant.group_size, plan.quant.scale_bits) for key, plan in plans.items()}
    assert sizes == {
        ("down", 3): (16, 6), ("down", 4): (32, None), ("down", 6): (16, 8),
        ("up", 3): (32, None), ("up", 4): (32, None), ("up", 6): (32, None),
    }  # fmt: skip


def test_other_formats_leave_it_as_it_is():
    opened = open_model(tiny_model("llama"))
    for name in ("compressed-tensors", "dense", "archive"):
        space = space_for(SearchSpace(), get_format(name), opened)
        assert space == SearchSpace()


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
