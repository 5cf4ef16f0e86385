"""What a walk takes, by shapes, and what a budget allows."""

from dataclasses import replace

import pytest
import torch

from srcr.engine import memory
from srcr.engine.memory import MemoryEstimate, MemoryPolicy, choose_policy, estimate_memory
from srcr.environment import parse_size
from srcr.errors import InputError
from srcr.models.checkpoint import open_model
from srcr.testing import FAMILIES, tiny_model

CPU = torch.device("cpu")
BASE = 400_000_000
ESTIMATE = MemoryEstimate(
    block_cached=170, block_repeated=270, forward=30, states=10, batches=4, dense_batches=0
)


def megabytes(*sizes, batches=4, dense=0):
    return MemoryEstimate(*(10**6 * n for n in sizes), batches, dense)


@pytest.fixture
def base(monkeypatch):
    """A program of 400 MB."""
    monkeypatch.setattr(memory, "resident_memory", lambda device: BASE)
    return BASE


def test_what_each_policy_takes(tmp_path):
    assert ESTIMATE.of(MemoryPolicy()) == 170 + 4 * 30 + 4 * 10
    assert ESTIMATE.of(MemoryPolicy(4)) == ESTIMATE.of(MemoryPolicy())
    assert ESTIMATE.of(MemoryPolicy(1)) == 270 + 30 + 4 * 10
    assert ESTIMATE.of(MemoryPolicy(0)) == 270 + 4 * 10
    assert ESTIMATE.of(MemoryPolicy(0, tmp_path)) == 270
    both = replace(ESTIMATE, dense_batches=2)
    assert both.of(MemoryPolicy()) == 170 + 6 * 30 + 6 * 10
    assert both.of(MemoryPolicy(3)) == 270 + 5 * 30 + 6 * 10
    assert both.of(MemoryPolicy(1)) == 270 + 2 * 30 + 6 * 10
    assert both.of(MemoryPolicy(0, tmp_path)) == 270


def test_the_fastest_policy_that_fits_is_taken(base, tmp_path):
    estimate = megabytes(80, 90, 30, 10, dense=2)
    note = None
    for policy in (
        MemoryPolicy(),
        MemoryPolicy(3),
        MemoryPolicy(1),
        MemoryPolicy(0),
        MemoryPolicy(0, tmp_path),
    ):
        chosen, note = choose_policy(estimate, base + estimate.of(policy), CPU, tmp_path)
        assert chosen == policy
        assert (note is None) == (policy == MemoryPolicy())
    assert "hidden states on disk" in note
    assert "4 of 4 batches" in note


def test_a_budget_that_cannot_be_met_names_a_smallest_that_can(base, tmp_path):
    estimate = megabytes(270, 270, 30, 10)
    tightest = estimate.of(MemoryPolicy(0, tmp_path))
    with pytest.raises(InputError) as caught:
        choose_policy(estimate, base + tightest - 1, CPU, tmp_path)
    message = str(caught.value)
    assert "--memory 670MB is too little" in message
    smallest = message.partition("use at least ")[2].partition(",")[0]
    choose_policy(estimate, parse_size(smallest), CPU, tmp_path)


def test_where_memory_is_plenty_a_small_model_keeps_what_it_frees(base, tmp_path):
    estimate = megabytes(80, 90, 30, 10, dense=2)
    enough = estimate.of(MemoryPolicy())
    for limit, keeps in ((enough, False), (int(1.4 * enough), False), (int(1.6 * enough), True)):
        policy = MemoryPolicy(keep_freed=keeps)
        assert choose_policy(estimate, base + limit, CPU, tmp_path) == (policy, None)
    large = replace(estimate, largest=memory.SMALL_MATRIX + 1)
    assert choose_policy(large, base + 2 * enough, CPU, tmp_path) == (MemoryPolicy(), None)


def test_without_a_budget_nothing_is_refused(base, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "available_memory", lambda device: 10**6)
    policy, note = choose_policy(ESTIMATE, None, CPU, tmp_path)
    assert (policy.cached_forwards, policy.activation_folder, note) == (None, None, None)
    policy, note = choose_policy(megabytes(270, 270, 30, 10), None, CPU, tmp_path)
    assert policy == MemoryPolicy(0, tmp_path)
    assert "about 670MB of memory, and 1MB are free" in note


def test_what_is_freed_goes_back_unless_the_policy_keeps_it(monkeypatch):
    released = []
    monkeypatch.setattr(memory, "release_memory", lambda: released.append(1))
    MemoryPolicy(keep_freed=True).tidy()
    assert released == []
    MemoryPolicy().tidy()
    assert released == [1]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_estimates_grow_with_the_data_and_not_with_the_depth(family):
    topology = open_model(tiny_model(family)).topology
    depth = "n_layer" if family == "gpt2" else "num_hidden_layers"
    deeper = open_model(tiny_model(family, **{depth: 4})).topology
    few, many = ([torch.zeros(2, 32)] * n for n in (2, 20))
    alone, both = (estimate_memory(topology, few, dense, torch.float32) for dense in (0, 2))
    assert estimate_memory(deeper, few, 2, torch.float32) == both
    assert (both.forward, both.states) == (alone.forward, alone.states)
    everything = MemoryPolicy()
    assert both.of(everything) - alone.of(everything) == 2 * (alone.forward + alone.states)
    assert both.states == 64 * 4 * 32
    more = estimate_memory(topology, many, 20, torch.float32)
    assert more.of(everything) - both.of(everything) == 36 * (both.forward + both.states)
    part = estimate_memory(topology, many, 5, torch.float32)
    assert part.block_cached > more.block_cached  # moments of the tokens that the dense model saw
    assert part.of(everything) - part.block_cached == 25 * (more.forward + more.states)
    weights = sum(r * c for name, (r, c) in topology.shapes.items() if ".0." in name)
    assert both.block_cached > 4 * weights
    assert both.largest == max(c * max(r, c) for r, c in topology.shapes.values())
    half = estimate_memory(topology, few, 2, torch.bfloat16)
    assert (2 * half.forward, 2 * half.states) == (both.forward, both.states)
    assert both.block_repeated > both.block_cached
