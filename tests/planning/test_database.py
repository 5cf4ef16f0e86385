import json

import pytest
import torch

from srcr.errors import InputError
from srcr.methods.joint import compress_unit
from srcr.planning.building import check_room
from srcr.planning.database import INDEX, LevelDatabase
from srcr.planning.levels import Level, Treatment
from srcr.types import LayerStats, QuantSpec, SweepSpec

UNIT = ("a.q", "a.k")


def made(level, dtype=torch.bfloat16, symmetric=True):
    torch.manual_seed(0)
    x = torch.randn(64, 32)
    weights = {name: torch.randn(8, 32).to(dtype).float() for name in UNIT}
    treatment = Treatment(quant=QuantSpec(group_size=16, symmetric=symmetric))
    plans = {name: treatment.layer(name, level) for name in UNIT}
    return compress_unit(weights, LayerStats(x.T @ x, 64), plans, SweepSpec(), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("level", [Level(0.25, 4), Level(0, 3), Level(0.5, 16)], ids=str)
def test_weights_come_back_as_they_were(level, dtype, symmetric, tmp_path):
    expected = made(level, dtype, symmetric)
    LevelDatabase(tmp_path, "c").put(UNIT, level, expected)
    again = LevelDatabase(tmp_path, "c")  # as another process would open it
    entry = again.find(UNIT, level)
    weights = again.weights(entry, dtype)
    assert set(weights) == set(UNIT)
    for name in UNIT:
        assert torch.equal(weights[name], expected[name].dequantize())
        assert entry.errors[name] == expected[name].error


def test_entries_belong_to_their_context_unit_and_level(tmp_path):
    LevelDatabase(tmp_path, "c").put(UNIT, Level(0, 4), made(Level(0, 4)))
    assert LevelDatabase(tmp_path, "c").find(UNIT, Level(0, 4))
    assert LevelDatabase(tmp_path, "other").find(UNIT, Level(0, 4)) is None
    assert LevelDatabase(tmp_path, "c").find(UNIT[:1], Level(0, 4)) is None
    assert LevelDatabase(tmp_path, "c").find(UNIT, Level(0, 5)) is None


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_entry_is_found_and_made_again(damage, tmp_path):
    first = LevelDatabase(tmp_path, "c")
    entry = first.put(UNIT, Level(0, 4), made(Level(0, 4)))
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
    assert again.find(UNIT, Level(0, 4)) is None
    assert again.put(UNIT, Level(0, 4), made(Level(0, 4))) == entry
    assert LevelDatabase(tmp_path, "c").find(UNIT, Level(0, 4)) == entry


def test_a_torn_index_line_is_no_entry(tmp_path):
    database = LevelDatabase(tmp_path, "c")
    database.put(UNIT, Level(0, 4), made(Level(0, 4)))
    with (tmp_path / INDEX).open("a") as stream:
        stream.write('\n{"key": "x", "sha')
    other = LevelDatabase(tmp_path, "c")
    other.put(UNIT, Level(0, 5), made(Level(0, 5)))
    found = LevelDatabase(tmp_path, "c")
    assert found.find(UNIT, Level(0, 4))
    assert found.find(UNIT, Level(0, 5))
    database.refresh()
    assert database.find(UNIT, Level(0, 5))
    lines = [line for line in (tmp_path / INDEX).read_text().splitlines() if line]
    assert json.loads(lines[0])["sha256"]


def test_a_database_that_is_too_large_is_refused():
    check_room(10, 10, 10)
    with pytest.raises(InputError, match="--database-limit"):
        check_room(2_000_000, 1_000_000, 10**12)
    with pytest.raises(InputError, match="free on its disk"):
        check_room(2_000_000, None, 1_000_000)
