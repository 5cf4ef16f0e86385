"""What a run needs, by shapes, and what a budget leaves it."""

from dataclasses import replace

import pytest
import torch

from srcr import budget, memory
from srcr.engine import Room
from srcr.errors import InputError
from srcr.models.topology import observe
from srcr.testing import FAMILIES, tiny_model

CPU = torch.device("cpu")
BASE = 400_000_000
NEED = budget.Needs(once=170, again=270, waiting=30, states=10, batches=4, dense=0)


@pytest.fixture
def base(monkeypatch):
    """A program of 400 MB."""
    monkeypatch.setattr(memory, "resident", lambda device: BASE)
    return BASE


def test_what_each_room_takes(tmp_path):
    assert NEED.of(Room()) == 170 + 4 * 30 + 4 * 10
    assert NEED.of(Room(4)) == NEED.of(Room())
    assert NEED.of(Room(1)) == 270 + 30 + 4 * 10
    assert NEED.of(Room(0)) == 270 + 4 * 10
    assert NEED.of(Room(0, tmp_path)) == 270
    both = replace(NEED, dense=2)
    assert both.of(Room()) == 170 + 6 * 30 + 6 * 10
    assert both.of(Room(3)) == 270 + 5 * 30 + 6 * 10
    assert both.of(Room(1)) == 270 + 2 * 30 + 6 * 10
    assert both.of(Room(0, tmp_path)) == 270


def test_the_fastest_room_that_fits_is_taken(base, tmp_path):
    need = budget.Needs(*(10**6 * n for n in (80, 90, 30, 10)), 4, 2)
    for room in (Room(), Room(3), Room(1), Room(0), Room(0, tmp_path)):
        found, said = budget.choose_room(need, base + need.of(room), CPU, tmp_path)
        assert found == room
        assert (said is None) == (room == Room())
    assert "hidden states on disk" in said
    assert "4 of 4 batches" in said


def test_a_budget_that_cannot_be_met_names_one_that_can(base, tmp_path):
    need = budget.Needs(*(10**6 * n for n in (270, 270, 30, 10)), 4, 0)
    with pytest.raises(InputError) as caught:
        budget.choose_room(need, base + need.of(Room(0, tmp_path)) - 1, CPU, tmp_path)
    said = str(caught.value)
    assert "--memory 670MB is too little" in said
    smallest = said.partition("use at least ")[2].partition(",")[0]
    budget.choose_room(need, memory.parse_size(smallest), CPU, tmp_path)


def test_where_memory_is_plenty_a_small_model_keeps_what_it_frees(base, tmp_path):
    need = budget.Needs(*(10**6 * n for n in (80, 90, 30, 10)), 4, 2)
    enough = need.of(Room())
    for limit, keeps in ((enough, False), (int(1.4 * enough), False), (int(1.6 * enough), True)):
        assert budget.choose_room(need, base + limit, CPU, tmp_path) == (Room(keeps=keeps), None)
    large = replace(need, largest=budget.SMALL + 1)
    assert budget.choose_room(large, base + 2 * enough, CPU, tmp_path) == (Room(), None)


def test_without_a_budget_nothing_is_refused(base, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "available", lambda device: 10**6)
    room, said = budget.choose_room(NEED, None, CPU, tmp_path)
    assert (room.waiting, room.folder, said) == (None, None, None)
    need = budget.Needs(*(10**6 * n for n in (270, 270, 30, 10)), 4, 0)
    room, said = budget.choose_room(need, None, CPU, tmp_path)
    assert room == Room(0, tmp_path)
    assert "about 670MB of memory, and 1MB are free" in said


@pytest.mark.parametrize("family", FAMILIES)
def test_needs_grow_with_the_data_and_not_with_the_depth(family):
    topology = observe(tiny_model(family))
    deeper = observe(
        tiny_model(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 4})
    )
    few, many = ([torch.zeros(2, 32)] * n for n in (2, 20))
    one, two = (budget.needs(topology, few, dense, torch.float32) for dense in (0, 2))
    assert budget.needs(deeper, few, 2, torch.float32) == two
    assert (two.waiting, two.states) == (one.waiting, one.states)
    assert two.of(Room()) - one.of(Room()) == 2 * (one.waiting + one.states)
    assert two.states == 64 * 4 * 32
    more = budget.needs(topology, many, 20, torch.float32)
    assert more.of(Room()) - two.of(Room()) == 36 * (two.waiting + two.states)
    part = budget.needs(topology, many, 5, torch.float32)
    assert part.once > more.once  # moments of the tokens that the dense model saw
    assert part.of(Room()) - part.once == 25 * (more.waiting + more.states)
    weights = sum(r * c for name, (r, c) in topology.shapes.items() if ".0." in name)
    assert two.once > 4 * weights
    assert two.largest == max(c * max(r, c) for r, c in topology.shapes.values())
    half = budget.needs(topology, few, 2, torch.bfloat16)
    assert (2 * half.waiting, 2 * half.states) == (two.waiting, two.states)
    assert two.again - two.once > 0
