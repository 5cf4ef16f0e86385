"""The training script: a run of three steps, whole and interrupted."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_bundled.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("train_bundled", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    threads = torch.get_num_threads()
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SEQUENCES", 1)
    yield module
    torch.set_num_threads(threads)


def test_interrupted_run_ends_with_the_same_files(script, tmp_path):
    def run(name: str, *more: str) -> Path:
        out = tmp_path / name / "model"
        places = ["--work", str(tmp_path / name), "--out", str(out)]
        script.main(["--steps", "3", "--items", "2", "--threads", "1", *places, *more])
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
    places = ["--threads", "1", "--work", str(tmp_path), "--out", str(tmp_path / "model")]
    script.main(["--steps", "6", "--stop-after", "5", *places])
    with pytest.raises(SystemExit, match="run of 6 steps"):
        script.main(["--steps", "40", *places])


def test_longer_runs_begin_alike(script):
    shared = script.decay_start(1000)
    rates = [[script.rate(step, steps) for step in range(shared)] for steps in (1000, 4000)]
    assert rates[0] == rates[1]
    assert script.rate(shared + 2, 1000) < script.rate(shared + 2, 4000) == script.PEAK_RATE


def test_batches_are_packed_documents(script):
    tokenizer = script.train_tokenizer()
    first, again, other = (script.batch(step, tokenizer) for step in (5, 5, 6))
    assert first.shape == (1, script.LENGTH)
    assert first.equal(again)
    assert not first.equal(other)
    assert first[0, 0] == tokenizer.bos_token_id
    ends = (first[0, :-1] == tokenizer.eos_token_id).nonzero()[:, 0]
    assert len(ends) > 1
    assert (first[0, ends + 1] == tokenizer.bos_token_id).all()
