"""What a search takes, and what a budget leaves."""

import pytest
import torch

from srcr.environment import parse_size
from srcr.errors import InputError
from srcr.models.checkpoint import open_model
from srcr.planning import memory
from srcr.planning.memory import (
    SearchMemory,
    TextShape,
    choose_search_policy,
    estimate_search_memory,
)
from srcr.testing import tiny_model

MB = 10**6
NEED = SearchMemory(base=100 * MB, writing=50 * MB, measuring=30 * MB, compressing=40 * MB,
                    finalist=90 * MB, evaluating=20 * MB)  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture
def resident(monkeypatch):
    """A program of 500 MB, on a machine with 4 GB free."""
    monkeypatch.setattr(memory, "resident_memory", lambda _: 500 * MB)
    monkeypatch.setattr(memory, "available_memory", lambda _: 4000 * MB)
    return 500 * MB


def choose(budget, cache_bytes=1 << 40, finalists=99, need=NEED):
    text = None if budget is None else f"{budget // MB}MB"
    return choose_search_policy(need, text, CPU, cache_bytes, finalists)


def test_an_estimate_counts_weights_and_predictions():
    opened = open_model(tiny_model("llama"))
    need = estimate_search_memory(opened, TextShape(24, torch.float32, 6, 100), 7)
    linears = sum(rows * cols for rows, cols in opened.topology.shapes.values())
    assert need.base == need.finalist == 4 * opened.parameters
    assert need.compressing == 7
    keys_and_values = 2 * 2 * 8 * len(opened.topology.blocks)  # of two heads of width 8 a block
    assert need.writing >= 4 * 24 * 128 * keys_and_values
    assert need.measuring >= 4 * linears + 2 * 4 * 24 * 6 * opened.vocabulary
    assert need.evaluating >= 4 * 24 * 100 * opened.vocabulary


def test_the_smallest_budget_that_is_named_is_enough(resident):
    with pytest.raises(InputError, match="--memory 700MB is too little for this search") as refused:
        choose(700 * MB)
    smallest = parse_size(str(refused.value).partition("use at least ")[2])
    policy, note = choose(smallest)
    assert policy.finalists == 1
    assert note is None
    assert resident + NEED.smallest <= smallest <= 1.05 * (resident + NEED.smallest)


@pytest.mark.parametrize("budget", [900 * MB, 1200 * MB, 2000 * MB])
def test_what_is_chosen_fits(budget, resident):
    policy, _ = choose(budget)
    held = resident + NEED.base + memory.SLACK
    assert held + policy.finalists * NEED.finalist + NEED.evaluating <= budget
    assert held + 3 * policy.cache_bytes + NEED.measuring <= budget
    more = policy.finalists + 1
    assert held + more * NEED.finalist + NEED.evaluating > budget, "no more would fit"


def test_no_more_is_held_than_is_of_use(resident):
    policy, _ = choose(4000 * MB, cache_bytes=5 * MB, finalists=4)
    assert (policy.cache_bytes, policy.finalists) == (5 * MB, 4)


def test_without_a_budget_half_of_what_is_free_is_taken(resident):
    policy, note = choose(None)
    assert note is None
    assert policy == choose(resident + 2000 * MB)[0]
    huge = SearchMemory(3000 * MB, MB, MB, MB, MB, MB)
    policy, note = choose(None, need=huge)
    assert (policy.cache_bytes, policy.finalists) == (0, 1)
    assert "it may fail" in note
