"""--memory: whatever the budget, the same bytes; or a budget that is refused with one that is enough."""

import json

import pytest

from srcr import compression
from srcr.engine import Room
from srcr.formats.checkpoint import partial_path
from srcr.testing import FAMILIES, save_tiny_model


def result(folder):
    """Every file that must not differ."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.name not in ("srcr.json", "README.md")
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_any_room_gives_the_same_bytes(srcr, ids, tmp_path, monkeypatch, family):
    folder = save_tiny_model(tmp_path / "model", family)
    monkeypatch.setattr(compression, "BATCH_TOKENS", 64)  # four batches
    found = []
    for n, waiting in enumerate((None, 2, 0)):
        out = tmp_path / f"out{n}"
        room = Room(waiting, partial_path(out) if waiting == 0 else None)
        monkeypatch.setattr(compression, "choose_room", lambda *_, room=room: (room, None))
        done = srcr("compress", folder, "-o", out, "--calibration", ids, "--sparsity", 0.25)
        assert done.code == 0, done.err
        found.append(result(out))
    assert found[0] == found[1] == found[2]


def test_the_smallest_budget_that_is_named_works(srcr, tiny, ids, tmp_path):
    command = ["compress", tiny, "-o", tmp_path / "out", "--calibration", ids]
    refused = srcr(*command, "--memory", "100MB")
    assert refused.code == 2
    assert not list(tmp_path.glob("out*"))
    smallest = refused.error().partition("use at least ")[2].partition(",")[0]
    assert srcr(*command, "--memory", smallest).code == 0


def test_calibration_by_the_model_itself_needs_it_whole(srcr, tiny, tmp_path):
    refused = srcr("compress", tiny, "-o", tmp_path / "out", "--memory", "10MB")
    assert refused.code == 2
    assert "has to be loaded whole" in refused.error()
    assert "another --calibration" in refused.error()


def test_a_config_file_takes_it(srcr, tiny, ids, tmp_path):
    (tmp_path / "run.yaml").write_text("memory: 1MB\n")
    command = ["compress", tiny, "-o", tmp_path / "out", "--calibration", ids]
    assert "--memory 1MB is too little" in srcr(*command, "--config", tmp_path / "run.yaml").error()
    done = srcr(*command, "--config", tmp_path / "run.yaml", "--memory", "100GB", "--json")
    assert json.loads(done.out)["peak_memory_bytes"] > 0
