"""Reading artefacts back: what belongs together, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from srcr.errors import InputError
from srcr.report import load_runs

MakeRuns = Callable[..., list[Path]]


def test_a_folder_gives_record_plan_and_evaluation(dozen: list[Path]) -> None:
    runs = load_runs(dozen)
    assert [run.name for run in runs] == [folder.name for folder in dozen]
    first = runs[3]
    assert first.record
    assert first.plan
    assert first.evaluation
    assert first.plan.layers[0].prune
    assert first.plan.layers[0].prune.sparsity == 0.25
    assert first.evaluation.tasks["knowledge"].chance == 0.125
    assert first.rates
    assert first.rates.entropy_bits


def test_an_evaluation_file_joins_the_folder_that_it_names(
    tmp_path: Path, make_runs: MakeRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = make_runs(tmp_path / "runs", 2)
    both = [json.loads((folder / "evaluation.json").read_text()) for folder in folders]
    for folder, evaluation in zip(folders, both, strict=True):
        (folder / "evaluation.json").unlink()
        evaluation["sr"] = 0.5
    (tmp_path / "report.json").write_text(json.dumps(both))
    (tmp_path / "one.json").write_text(json.dumps(both[0]))
    monkeypatch.chdir(tmp_path)
    for paths in (["report.json"], [*folders, "report.json"], ["report.json", folders[1]]):
        runs = load_runs(paths)
        assert {run.name for run in runs} == {"w4", "w3"}
        assert all(run.record and run.evaluation and run.evaluation.sr == 0.5 for run in runs)
    with pytest.raises(InputError, match="both evaluate"):
        load_runs(["report.json", "one.json"])
    monkeypatch.chdir("/")
    assert load_runs([tmp_path / "one.json"])[0].record, "found beside the file"
    shutil.rmtree(folders[0])
    lone = load_runs([tmp_path / "one.json"])[0]
    assert lone.record is None
    assert lone.name == "w4"


def test_a_named_file_takes_the_place_of_the_folders_own(
    tmp_path: Path, make_runs: MakeRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder,) = make_runs(tmp_path / "runs", 1)
    evaluation = json.loads((folder / "evaluation.json").read_text()) | {"sr": 0.125}
    (tmp_path / "new.json").write_text(json.dumps(evaluation))
    monkeypatch.chdir(tmp_path)
    (run,) = load_runs([folder, "new.json"])
    assert run.evaluation
    assert run.evaluation.sr == 0.125


def test_equal_names_are_told_apart(tmp_path: Path, make_runs: MakeRuns) -> None:
    folders = [*make_runs(tmp_path / "a", 1), *make_runs(tmp_path / "b", 1)]
    assert [run.name for run in load_runs(folders)] == ["a/w4", "b/w4"]
    assert len(load_runs([folders[0], folders[0]])) == 1


def test_an_older_evaluation_still_reads(tmp_path: Path, make_runs: MakeRuns) -> None:
    (folder,) = make_runs(tmp_path, 1)
    file = folder / "evaluation.json"
    old = json.loads(file.read_text()) | {"semantic": None, "tasks": {}, "sr": None, "srcr": None}
    old["divergence"]["kl"] = {"value": 0.1, "ci95": [0.05, 0.15], "p99": 1.0}
    del old["divergence"]["flips"], old["divergence"]["perplexity"]["ratio"], old["command"]
    del old["rates"]["entropy_bits"]
    file.write_text(json.dumps(old))
    (run,) = load_runs([folder])
    assert run.evaluation
    assert run.evaluation.divergence
    assert run.evaluation.divergence.kl.p50 is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "empty list"),
        ('{"a": 1}', "is not an evaluation"),
        ("3", "is not an evaluation"),
        ('{"base": "b", "compressed": "c", "rates": {}}', "does not fit"),
    ],
)
def test_what_is_not_ours_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputError, match=message):
        load_runs([tmp_path / "x.json"])


def test_nothing_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run was given"):
        load_runs([])
    with pytest.raises(InputError, match="does not exist"):
        load_runs([tmp_path / "absent"])
    with pytest.raises(InputError, match=r"neither srcr\.json"):
        load_runs([tmp_path])
    (tmp_path / "srcr.json").write_text("{}")
    with pytest.raises(InputError, match="no 'rates'"):
        load_runs([tmp_path])
