"""The training script: a run of three steps, whole and interrupted."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_bundled.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("train_bundled", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    threads = torch.get_num_threads()
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)


def test_interrupted_run_ends_with_the_same_files(script, tmp_path):
    def run(name: str, *more: str) -> Path:
        out = tmp_path / name / "model"
        places = ["--work", str(tmp_path / name), "--out", str(out)]
        script.main(["--steps", "3", "--items", "2", *places, *more])
        return out

    whole = run("whole")
    assert not run("parts", "--stop-after", "2").exists()
    parts = run("parts")
    names = {path.name for path in whole.iterdir()}
    assert names == {path.name for path in parts.iterdir()}
    for name in names - {"training.json"}:
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    figures = json.loads((parts / "training.json").read_text())
    assert figures["steps"] == 3
    assert set(figures["accuracy_by_bits"]) == {"16", "4", "3", "2"}


def test_checkpoint_of_another_run_is_refused(script, tmp_path):
    places = ["--work", str(tmp_path), "--out", str(tmp_path / "model")]
    script.main(["--steps", "3", "--stop-after", "1", *places])
    with pytest.raises(SystemExit, match="3 steps"):
        script.main(["--steps", "4", *places])
