import json
from threading import Thread

import pytest
import torch

from srcr.errors import InputError
from srcr.models.topology import LinearGroup
from srcr.numerics.hessian import LayerStatistics
from srcr.planning.database.build import check_database_size
from srcr.planning.database.store import INDEX, CachedWeights, LevelDatabase
from srcr.planning.space import SearchSpace
from srcr.plans.specs import CompressionLevel, QuantSpec, SolverSpec
from srcr.solver.problem import LayerProblem
from srcr.solver.solve import solve

GROUP = LinearGroup(("a.q", "a.k"))
FOUR, FIVE = CompressionLevel(0, 4), CompressionLevel(0, 5)


def solved(level, dtype=torch.bfloat16, symmetric=True):
    torch.manual_seed(0)
    x = torch.randn(64, 32)
    weights = {name: torch.randn(8, 32).to(dtype).float() for name in GROUP.names}
    space = SearchSpace((), quant=QuantSpec(group_size=16, symmetric=symmetric))
    plans = space.group_plans(GROUP, level, dict.fromkeys(GROUP.names, (8, 32)))
    return solve(LayerProblem(weights, plans, LayerStatistics(x.T @ x), SolverSpec(), dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("level", [(0.25, 4), (0, 3), (0.5, 16)], ids=str)
def test_weights_come_back_as_they_were(level, dtype, symmetric, tmp_path):
    level = CompressionLevel(*level)
    expected = solved(level, dtype, symmetric)
    LevelDatabase(tmp_path, "c").put(GROUP, level, expected)
    again = LevelDatabase(tmp_path, "c")  # as another process would open it
    entry = again.find(GROUP, level)
    weights = again.weights(entry)
    assert set(weights) == set(GROUP.names)
    for name in GROUP.names:
        assert torch.equal(weights[name], expected[name].dequantize())
        assert entry.errors[name] == expected[name].error


def test_entries_belong_to_their_context_group_and_level(tmp_path):
    LevelDatabase(tmp_path, "c").put(GROUP, FOUR, solved(FOUR))
    assert LevelDatabase(tmp_path, "c").find(GROUP, FOUR)
    assert LevelDatabase(tmp_path, "other").find(GROUP, FOUR) is None
    assert LevelDatabase(tmp_path, "c").find(LinearGroup(GROUP.names[:1]), FOUR) is None
    assert LevelDatabase(tmp_path, "c").find(GROUP, FIVE) is None


def test_a_whole_number_is_the_same_sparsity(tmp_path):
    """A study gives levels back with sparsities that are floats."""
    database = LevelDatabase(tmp_path, "c")
    database.put(GROUP, CompressionLevel(0, 4), solved(FOUR))
    assert database.find(GROUP, CompressionLevel(0.0, 4))


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_entry_is_found_and_made_again(damage, tmp_path):
    entry = LevelDatabase(tmp_path, "c").put(GROUP, FOUR, solved(FOUR))
    path = tmp_path / f"{entry.sha256}.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        path.write_bytes(bytes(data))
    elif damage == "cut":
        path.write_bytes(bytes(data[:-8]))
    else:
        path.unlink()
    again = LevelDatabase(tmp_path, "c")
    assert again.find(GROUP, FOUR) is None
    assert again.put(GROUP, FOUR, solved(FOUR)) == entry
    assert LevelDatabase(tmp_path, "c").find(GROUP, FOUR) == entry


def test_a_torn_index_line_is_no_entry(tmp_path):
    database = LevelDatabase(tmp_path, "c")
    database.put(GROUP, FOUR, solved(FOUR))
    with (tmp_path / INDEX).open("a") as stream:
        stream.write('\n{"key": "x", "sha')
    LevelDatabase(tmp_path, "c").put(GROUP, FIVE, solved(FIVE))
    again = LevelDatabase(tmp_path, "c")
    assert again.find(GROUP, FOUR)
    assert again.find(GROUP, FIVE)
    assert database.find(GROUP, FIVE) is None
    database.refresh()
    assert database.find(GROUP, FIVE)
    lines = [line for line in (tmp_path / INDEX).read_text().splitlines() if line]
    assert json.loads(lines[0])["sha256"]


def test_several_write_at_once(tmp_path):
    weights = {
        level: solved(level) for level in (CompressionLevel(0, bits) for bits in range(2, 9))
    }

    def put(part):
        database = LevelDatabase(tmp_path, "c")
        for level in part:
            database.put(GROUP, level, weights[level])

    threads = [Thread(target=put, args=([*weights][first::4],)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = [line for line in (tmp_path / INDEX).read_text().splitlines() if line]
    assert len({json.loads(line)["key"] for line in lines}) == len(lines) == len(weights)


@pytest.mark.parametrize(("cache_bytes", "reads"), [(1 << 20, 2), (0, 4)])
def test_weights_are_read_once_where_they_fit(cache_bytes, reads, tmp_path, monkeypatch):
    database = LevelDatabase(tmp_path, "c")
    for level in (FOUR, FIVE):
        database.put(GROUP, level, solved(level))
    count = []
    weights_of = LevelDatabase.weights
    monkeypatch.setattr(
        LevelDatabase, "weights", lambda self, entry: count.append(entry) or weights_of(self, entry)
    )
    cached = CachedWeights(database, cache_bytes)
    for _ in range(2):
        for level in (FOUR, FIVE):
            weights, expected = cached(GROUP, level), solved(level)
            assert all(torch.equal(weights[n], expected[n].dequantize()) for n in GROUP.names)
    assert len(count) == reads


def test_a_database_that_is_too_large_is_refused():
    check_database_size(10, 10, 10)
    with pytest.raises(InputError, match="--database-limit"):
        check_database_size(2_000_000, 1_000_000, 10**12)
    with pytest.raises(InputError, match="free on its disk"):
        check_database_size(2_000_000, None, 1_000_000)
