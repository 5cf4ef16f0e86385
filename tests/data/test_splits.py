"""Parts of a source that share no sequence, by content."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from srcr.data.splits import (
    CHOICE,
    FEWEST,
    SEARCH,
    TEST,
    check_disjoint,
    item_indices,
    prompts_of,
    search_sequences,
    split_tokens,
)
from srcr.data.tokens import Tokens
from srcr.errors import InputError


def random_tokens(n, length=12, vocabulary=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Tokens.of(torch.randint(0, vocabulary, (n, length), generator=generator), "random")


def rows(tokens):
    return {tuple(row) for row in tokens.input_ids.tolist()}


def test_a_long_source_gives_every_part_its_size():
    splits = split_tokens(random_tokens(400), 128, SEARCH)
    assert [len(part.input_ids) for part in splits.parts()] == [128, SEARCH, CHOICE, TEST]


@given(
    n=st.integers(9, 300),
    calibration=st.integers(1, 128),
    vocabulary=st.sampled_from([2, 50]),
    seed=st.integers(0, 100),
)
def test_no_two_parts_share_a_sequence_whatever_the_source_holds(n, calibration, vocabulary, seed):
    """Sequences of two tokens over two words repeat all the time."""
    tokens = random_tokens(n, 5, vocabulary, seed)
    assume(len(rows(tokens)) >= 9 + calibration)  # enough of them are different
    splits = split_tokens(tokens, calibration, SEARCH)
    parts = splits.parts()
    for i, left in enumerate(parts):
        assert len(left.input_ids) >= (1 if i == 0 else FEWEST)
        for right in parts[i + 1 :]:
            assert rows(left).isdisjoint(rows(right))
    order = [tuple(row) for row in tokens.input_ids.tolist()]
    first = [order.index(row) for part in parts for row in map(tuple, part.input_ids.tolist())]
    assert first[len(parts[0].input_ids) :] == sorted(first[len(parts[0].input_ids) :])


@pytest.mark.parametrize("n", range(1, 12))
def test_the_fewest_sequences_that_are_named_are_enough(n):
    tokens = random_tokens(n)
    if n >= 9:
        assert min(len(part.input_ids) for part in split_tokens(tokens, 128, SEARCH).parts()) >= 1
    else:
        with pytest.raises(InputError, match="needs at least 9"):
            split_tokens(tokens, 128, SEARCH)


def test_parts_that_share_a_sequence_are_refused():
    tokens = random_tokens(4)
    other = Tokens.of(torch.cat([random_tokens(3, seed=1).input_ids, tokens.input_ids[:1]]), "x")
    check_disjoint([tokens, random_tokens(3, seed=1)])
    with pytest.raises(InputError, match=r"share sequences \(random, x\)"):
        check_disjoint([tokens, other])


def test_prompts_are_pieces_of_a_part_and_never_those_of_another():
    choice, test = random_tokens(20, 30), random_tokens(20, 30, seed=1)
    test.input_ids[3] = choice.input_ids[5]  # a piece that repeats
    first = prompts_of(choice, 50, 8)
    second = prompts_of(test, 50, 8, excluded=first)
    assert rows(first).isdisjoint(rows(second))
    pieces = {tuple(row[i : i + 8]) for row in choice.input_ids.tolist() for i in (0, 8, 16)}
    assert rows(first) <= pieces
    assert len(first.input_ids) == 50
    with pytest.raises(InputError, match="do not fit into sequences of 30"):
        prompts_of(choice, 5, 31)
    with pytest.raises(InputError, match="fewer than 2 different prompts"):
        prompts_of(Tokens.of(torch.zeros(5, 9)), 5, 8)


@given(
    lengths=st.lists(st.integers(2, 20), min_size=4, max_size=12),
    prefix=st.sampled_from([(), (7,), (7, 8)]),
    length=st.integers(3, 6),
)
def test_every_prompt_begins_as_the_model_expects(lengths, prefix, length):
    """Pieces are of real tokens alone, and behind the first each has the prefix put before it."""
    assume(sum(n + len(prefix) >= length for n in lengths) >= FEWEST)
    count = iter(range(100, 1000))
    contents = [[next(count) for _ in range(n)] for n in lengths]
    tokens = Tokens.of([[*prefix, *content] for content in contents], prefix=prefix)
    prompts = prompts_of(tokens, 1000, length).input_ids.tolist()
    step = length - len(prefix)
    pieces = [
        [*prefix, *content[start : start + step]]
        for start in range(0, 20, step)
        for content in contents
        if start + step <= len(content)
    ]
    assert prompts == pieces


@given(n=st.integers(12, 40), seed=st.integers(0, 50))
def test_parts_keep_what_their_rows_are(n, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (n,), generator=generator).tolist()
    ids = random_tokens(n, 9, 500, seed).input_ids.tolist()
    tokens = Tokens.of(
        [row[:length] for row, length in zip(ids, lengths, strict=True)], prefix=(3,)
    )
    splits = split_tokens(tokens, 4, SEARCH)
    given_rows = [tuple(row.tolist()) for row in tokens.rows()]
    for part in splits.parts():
        assert part.prefix == (3,)
        assert all(tuple(row.tolist()) in given_rows for row in part.rows())


@given(count=st.integers(4, 200), seed=st.integers(0, 20))
def test_halves_of_a_task_are_disjoint_and_all_of_it(count, seed):
    choice, test = (item_indices(count, part, seed, "a") for part in ("choice", "test"))
    assert sorted(choice + test) == list(range(count))
    assert abs(len(choice) - len(test)) <= 1
    assert choice == item_indices(count, "choice", seed, "a")
    assert item_indices(count, None, seed, "a") == list(range(count))


def test_a_task_too_small_to_split():
    with pytest.raises(InputError, match="task 'a' has 3 items"):
        item_indices(3, "test", 0, "a")


def test_small_models_are_searched_on_more():
    assert search_sequences(10**9) == SEARCH
    assert search_sequences(1) == 2 * SEARCH
