"""Entropy coding: everything comes back to the bit, at the size that theory says, or is refused."""

from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from srcr.errors import InputError

pytest.importorskip("constriction")
pytest.importorskip("zstandard")

from srcr.numerics.coding import CHUNK, decode_symbols, encode_symbols
from srcr.numerics.float_coding import PLANES, RAW, SPARSE, decode_floats, encode_floats


def entropy(symbols):
    """Bits a symbol by frequencies alone."""
    share = np.bincount(symbols.ravel()) / symbols.size
    share = share[share > 0]
    return -(share * np.log2(share)).sum()


def normal(rows, cols, bits, spread=None, seed=0):
    """Codes as rounding a weight gives them, the rows and columns of different size."""
    random = np.random.default_rng(seed)
    half = 1 << bits - 1
    values = random.normal(0, spread or half / 4, (rows, cols))
    values *= np.exp(random.normal(0, 0.4, (rows, 1)) + random.normal(0, 0.4, (1, cols)))
    return (np.clip(np.rint(values), -half, half - 1) + half).astype(np.uint8)


@given(
    rows=st.integers(0, 40),
    cols=st.integers(0, 40),
    lowest=st.integers(0, 255),
    highest=st.integers(0, 255),
    seed=st.integers(0, 9),
)
def test_any_symbols_come_back(rows, cols, lowest, highest, seed):
    lowest, highest = sorted((lowest, highest))
    random = np.random.default_rng(seed)
    symbols = random.integers(lowest, highest + 1, (rows, cols)).astype(np.uint8)
    assert np.array_equal(decode_symbols(encode_symbols(symbols), symbols.shape), symbols)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_size_is_at_most_the_entropy(bits):
    symbols = normal(384, 512, bits)
    size = 8 * len(encode_symbols(symbols)) / symbols.size
    assert size < entropy(symbols) * 1.005
    assert size < bits


def test_rows_and_columns_of_different_size_take_less():
    symbols = normal(512, 512, 4)
    assert 8 * len(encode_symbols(symbols)) / symbols.size < 0.945 * entropy(symbols)


def test_several_chunks():
    symbols = normal(3 * CHUNK // 2048 + 1, 2048, 2)
    data = encode_symbols(symbols)
    assert np.array_equal(decode_symbols(data, symbols.shape), symbols)


def test_the_code_is_the_same_every_time():
    symbols = normal(64, 64, 4)
    assert encode_symbols(symbols) == encode_symbols(symbols.copy())


@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(1, 255), seed=st.integers(0, 3))
def test_a_damaged_code_is_refused_or_stays_in_its_shape(place, byte, seed):
    """Checksums are the container's; here nothing else than an InputError, and no wrong size."""
    symbols = normal(24, 40, 4, seed=seed)
    data = bytearray(encode_symbols(symbols))
    data[int(place * len(data))] ^= byte
    with suppress(InputError):
        assert decode_symbols(bytes(data), symbols.shape).shape == symbols.shape


@given(length=st.integers(0, 400))
def test_a_code_that_is_cut_off_is_refused(length):
    symbols = normal(24, 40, 4)
    data = encode_symbols(symbols)
    with pytest.raises(InputError):
        decode_symbols(data[: min(length, len(data) - 1)], symbols.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (600,), (40, 64), (3, 20, 50)])
@pytest.mark.parametrize("zeros", [0.0, 0.4])
def test_any_float_tensor_comes_back_to_the_bit(dtype, shape, zeros):
    generator = torch.Generator().manual_seed(1)
    tensor = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    tensor = tensor * (torch.rand(shape, generator=generator) >= zeros)
    tensor = torch.where(tensor == 0, torch.zeros_like(tensor), tensor)
    back = decode_floats(encode_floats(tensor), tuple(shape), dtype)
    assert back.dtype == dtype
    assert back.shape == tensor.shape
    assert torch.equal(bits(back), bits(tensor))


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -0.0, 1e-40, -1e-40])
def test_special_numbers_come_back_to_the_bit(special):
    tensor = torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
    tensor[::2] = 0
    tensor[0, :5] = special
    back = decode_floats(encode_floats(tensor), (32, 64), torch.float32)
    assert torch.equal(bits(back), bits(tensor))


def test_how_floats_are_coded():
    dense = torch.randn(64, 64, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    sparse = dense * (torch.arange(64) % 2)
    sparse = torch.where(sparse == 0, torch.zeros_like(sparse), sparse)
    negative = torch.where(sparse == 0, -torch.zeros_like(sparse), sparse)
    modes = [encode_floats(t)[0] for t in (dense[:2, :2], dense, sparse, negative)]
    assert modes == [RAW, PLANES, SPARSE, PLANES]
    sizes = [len(encode_floats(t)) / t.nbytes for t in (dense, sparse)]
    assert sizes[0] < 0.70  # exponents of a normal distribution take about 2.6 of 8 bits
    assert sizes[1] < 0.42


def test_other_tensors_stay_as_they_are():
    tensor = torch.arange(2000)
    back = decode_floats(encode_floats(tensor), (2000,), torch.int64)
    assert torch.equal(back, tensor)


@pytest.mark.parametrize(
    "damaged", [b"", b"\x00", b"\x07" + bytes(20), bytes(8), b"\x01" + bytes(30)]
)
def test_damaged_floats_are_refused(damaged):
    with pytest.raises(InputError):
        decode_floats(damaged, (40, 64), torch.bfloat16)
