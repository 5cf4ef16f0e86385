"""Compressed weights as named tensors and back, bit for bit; small numbers packed without gaps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from srcr.formats.native import decode, decode_from, encode, encode_all
from srcr.numerics.compressed import CompressedWeight
from srcr.numerics.grid import Grid, code_range
from srcr.numerics.packing import CHUNK_ELEMENTS, pack, packed_bytes, unpack

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@st.composite
def weights(draw):
    """Any weight: quantized on any grid or not, pruned or not."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    rows, groups, size = draw(st.integers(1, 9)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    cols, dtype = groups * size, draw(DTYPES)
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(rows, cols, generator=generator) > draw(st.floats(0, 1))
    error = draw(st.floats(0, 1e3))
    if draw(st.booleans()):
        values = torch.randn(rows, cols, generator=generator).to(dtype)
        return CompressedWeight(mask, error, values=values)
    bits = draw(st.integers(2, 8))
    lowest, highest = code_range(bits)
    codes = torch.randint(lowest, highest + 1, (rows, cols), generator=generator).to(torch.int8)
    codes.view(-1)[0], codes.view(-1)[-1] = lowest, highest
    scale = (torch.randn(rows, groups, generator=generator) * 0.05).to(dtype).float()
    zero_point = None
    if draw(st.booleans()):
        zero_point = torch.randint(lowest, highest + 1, (rows, groups), generator=generator).float()
    return CompressedWeight(mask, error, codes, Grid(scale, zero_point, bits, size, dtype))


def assert_same(actual, expected):
    def same(left, right):
        assert (left is None) == (right is None)
        assert left is None or (left.dtype == right.dtype and torch.equal(left, right))

    for part in ("mask", "codes", "values"):
        same(getattr(actual, part), getattr(expected, part))
    assert actual.error == expected.error
    assert (actual.grid is None) == (expected.grid is None)
    if expected.grid is not None:
        for part in ("scale", "zero_point"):
            same(getattr(actual.grid, part), getattr(expected.grid, part))
        for part in ("num_bits", "group_size", "dtype"):
            assert getattr(actual.grid, part) == getattr(expected.grid, part)
    assert torch.equal(actual.dequantize(), expected.dequantize())


@settings(max_examples=200)
@given(weights())
def test_a_weight_comes_back_bit_for_bit(weight):
    tensors = encode(weight)
    assert_same(decode(tensors), weight)
    assert_same(decode(load(save(tensors))), weight)


@given(st.lists(weights(), min_size=1, max_size=3))
def test_several_weights_share_a_file(several):
    named = {f"model.layers.{i}.q_proj": weight for i, weight in enumerate(several)}
    tensors = encode_all(named)
    for name, weight in named.items():
        assert_same(decode_from(tensors, tensors.__getitem__, name), weight)


def test_codes_and_masks_are_packed():
    grid = Grid(torch.ones(64, 1), None, 3, 256, torch.float32)
    codes = torch.zeros(64, 256, dtype=torch.int8)
    weight = CompressedWeight(torch.ones(64, 256, dtype=torch.bool), 0.0, codes, grid)
    tensors = encode(weight)
    assert tensors["codes"].nbytes == 64 * 256 * 3 // 8
    assert tensors["mask"].nbytes == 64 * 256 // 8


@given(
    values=st.lists(st.integers(0, 255), max_size=70),
    num_bits=st.integers(1, 8),
)
def test_packed_numbers_come_back(values, num_bits):
    numbers = torch.tensor([value % 2**num_bits for value in values], dtype=torch.uint8)
    packed = pack(numbers, num_bits)
    assert packed.numel() == packed_bytes(len(values), num_bits) == -(-len(values) // 8) * num_bits
    assert torch.equal(unpack(packed, num_bits, (len(values),)), numbers)


@pytest.mark.parametrize("size", [CHUNK_ELEMENTS - 1, CHUNK_ELEMENTS, CHUNK_ELEMENTS + 9])
def test_more_numbers_than_are_packed_at_a_time(size):
    numbers = torch.randint(0, 8, (size,), dtype=torch.uint8)
    assert torch.equal(unpack(pack(numbers, 3), 3, (size,)), numbers)


def test_bytes_that_do_not_hold_the_shape_are_refused():
    with pytest.raises(ValueError, match="do not hold"):
        unpack(torch.zeros(3, dtype=torch.uint8), 4, (8,))
