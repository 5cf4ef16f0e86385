"""Entropy of codes and masks."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from srcr.numerics.entropy import binary_entropy, code_entropy, sparse_entropy


@given(st.lists(st.integers(-8, 7), min_size=1, max_size=200))
def test_codes_against_a_direct_count(codes):
    shares = [codes.count(code) / len(codes) for code in set(codes)]
    expected = -sum(share * math.log2(share) for share in shares)
    result = code_entropy(torch.tensor(codes, dtype=torch.int8))
    assert result == pytest.approx(expected, abs=1e-9)
    assert 0 <= result <= math.log2(len(set(codes))) + 1e-9


def test_all_codes_alike_need_nothing_and_all_equally_often_need_every_bit():
    assert code_entropy(torch.zeros(3, 5, dtype=torch.int8)) == 0
    assert code_entropy(torch.arange(16, dtype=torch.int8).repeat(7)) == pytest.approx(4)


@given(st.floats(0, 1))
def test_a_mask_needs_at_most_one_bit(share):
    assert 0 <= binary_entropy(share) <= 1
    assert binary_entropy(share) == pytest.approx(binary_entropy(1 - share), abs=1e-9)


def test_sparse_values():
    assert sparse_entropy(0) == 16
    assert sparse_entropy(1) == 0
    assert sparse_entropy(0.5, bits=4) == pytest.approx(1 + 2)
