"""Rows of differing length: padding on either side is cut off, and what is left is what was there."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from srcr.data.tokens import Tokens, bos_token
from srcr.errors import InputError
from srcr.testing import tiny_model

ROWS = st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=7), min_size=1, max_size=8)


def padded(rows, side, width=None, filler=99):
    """(ids, mask) of rows with padding on a side, or on one that differs from row to row."""
    width = width or max(map(len, rows))
    ids = torch.full((len(rows), width), filler)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        right = side == "right" or (side == "mixed" and number % 2)
        start = 0 if right else width - len(row)
        ids[number, start : start + len(row)] = torch.tensor(row)
        mask[number, start : start + len(row)] = 1
    return ids, mask


def same(left, right):
    equal = torch.equal(left.input_ids, right.input_ids)
    return (
        equal and torch.equal(left.row_lengths, right.row_lengths) and left.sha256 == right.sha256
    )


@given(rows=ROWS, side=st.sampled_from(["left", "right", "mixed"]), more=st.integers(0, 3))
def test_where_the_padding_was_makes_no_difference(rows, side, more):
    width = max(map(len, rows)) + more
    ids, mask = padded(rows, side, width)
    tokens = Tokens.of(ids, "rows", mask)
    assert same(tokens, Tokens.of(rows))
    assert same(tokens, Tokens.of(ids, "rows", mask.bool()))
    assert [row.tolist() for row in tokens.rows()] == rows
    assert tokens.attention_mask.sum(1).tolist() == [len(row) for row in rows]
    assert tokens.n_tokens == sum(map(len, rows))
    equal = len(set(map(len, rows))) == 1
    assert (tokens.lengths is None) == equal
    if equal:
        assert same(tokens, Tokens.of(torch.tensor(rows)))
    record = tokens.record()
    assert (record.samples, record.tokens) == (len(rows), tokens.n_tokens)
    assert record.seq_len == max(map(len, rows))
    assert record.size == f"{len(rows)} x {'' if equal else 'up to '}{record.seq_len} tokens"


@given(rows=ROWS, max_tokens=st.integers(1, 20))
def test_batches_hold_every_row_once_without_padding(rows, max_tokens):
    tokens = Tokens.of(rows)
    batches = tokens.batches(max_tokens)
    numbers = [number for batch in batches for number in batch.rows.tolist()]
    assert sorted(numbers) == list(range(len(rows)))
    for batch in batches:
        assert batch.input_ids.tolist() == [rows[number] for number in batch.rows.tolist()]
        assert len(batch.rows) == 1 or batch.input_ids.numel() <= max_tokens
    lengths = [batch.input_ids.shape[1] for batch in batches]
    assert lengths == sorted(lengths, reverse=True)


@given(n=st.integers(1, 9), length=st.integers(2, 6), max_tokens=st.integers(1, 30))
def test_batches_of_full_rows_are_the_rows_in_their_order(n, length, max_tokens):
    ids = torch.arange(n * length).view(n, length)
    expected = torch.split(ids, max(1, max_tokens // length))
    batches = Tokens.of(ids).batches(max_tokens)
    assert len(batches) == len(expected)
    assert all(torch.equal(b.input_ids, e) for b, e in zip(batches, expected, strict=True))


@given(rows=ROWS, data=st.data())
def test_parts_are_the_rows_alone(rows, data):
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1))
    tokens = Tokens.of(rows, "rows", prefix=(4,))
    part = tokens.select(chosen)
    assert same(part, Tokens.of([rows[number] for number in chosen]))
    assert (part.prefix, part.source) == ((4,), "rows")
    length = data.draw(st.integers(2, 8))
    assert same(tokens.crop(length), Tokens.of([row[:length] for row in rows]))


def test_a_row_is_known_by_its_tokens_alone():
    short = Tokens.of([[1, 2, 3]])
    among = Tokens.of([[1, 2, 3, 0], [1, 2, 3]])
    assert short.row_hashes()[0] == among.row_hashes()[1] != among.row_hashes()[0]
    assert among.sha256 != Tokens.of(among.input_ids).sha256  # zeros that are tokens


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 1], [1, 0, 1]], "attention_mask of row 1 has padding between tokens"),
        ([[1, 1, 1], [0, 0, 0]], "row 1 has 0 tokens, too little to predict: leave out"),
        ([[1, 1, 1], [0, 1, 0]], "row 1 has 1 token, too little to predict"),
        ([[1, 1, 1], [2, 1, 1]], "attention_mask of row 1 holds 2: use 1 for tokens and 0"),
        ([[1, 1, 1], [1, -1, 1]], "attention_mask of row 1 holds -1"),
        ([[1.0, 1, 1], [1, 1, 1]], r"must be integers or booleans \[2, 3\].* got torch.float32"),
        ([[1, 1], [1, 1]], r"\[2, 3\], as input_ids, got torch.int64 \[2, 2\]"),
        ([1, 1, 1], r"\[2, 3\], as input_ids, got torch.int64 \[3\]"),
    ],
)
def test_masks_that_cannot_be(mask, message):
    with pytest.raises(InputError, match=message) as caught:
        Tokens.of(torch.ones(2, 3).long(), "rows", torch.tensor(mask))
    assert str(caught.value).startswith("rows: ")
    assert "\n" not in str(caught.value)


def test_the_first_token_by_the_config():
    for value, expected in ((5, 5), ([6, 7], 6), ([], None), (None, None)):
        assert bos_token(SimpleNamespace(bos_token_id=value)) == expected
    assert bos_token(tiny_model("llama").config) == 1
