"""search(), as Python calls it."""

import shutil
from dataclasses import replace

import pytest
import torch

from srcr.data.specs import Calibration
from srcr.errors import InputError, SrcrError
from srcr.models import checkpoint
from srcr.models.checkpoint import open_model
from srcr.pipelines import search as pipeline
from srcr.pipelines.compress import compress
from srcr.pipelines.options import Output, RunOptions
from srcr.pipelines.search import search
from srcr.planning.space import SearchSpace, level_grid
from srcr.planning.specs import Resources, SearchSpec
from srcr.plans.objective import Constraint, Objective
from srcr.plans.plan import Recipe, Target
from srcr.plans.recovery import RecoverySpec
from srcr.plans.specs import CompressionLevel, PruneSpec, QuantSpec
from srcr.records.run import RunRecord
from srcr.records.search import SearchResult
from srcr.records.sharing import shareable
from srcr.serialize import from_dict, from_yaml, read_json, to_json
from srcr.storage.safetensors import TensorFiles
from srcr.testing import save_tiny_model, tiny_model

pytestmark = pytest.mark.slow

SPACE = SearchSpace(level_grid([0.0, 0.2, 0.4], [3, 4, 5]), quant=QuantSpec(group_size=-1))
TARGET = Target(tcr=0.8)
SPEC = SearchSpec(trials=16)
#: As short as a search can be, where what is looked at is not what it finds.
SHORT = SearchSpec(trials=1)
QUIET = RunOptions(quiet=True)
IDS = torch.randint(0, 96, (40, 24), generator=torch.Generator().manual_seed(0))
DATA = Calibration(IDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture(scope="module")
def openings():
    """The functions of models.checkpoint that read the base, as often as the finished search called them."""
    return []


@pytest.fixture(scope="module")
def finished(folder, openings, tmp_path_factory):
    """The output of a search, and what it returned."""
    out = tmp_path_factory.mktemp("search") / "out"

    def counted(function):
        def call(*args, **kwargs):
            if str(folder) in str(args[0]):
                openings.append(function.__name__)
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_open_folder", "hash_and_inspect", "load_model"):
            patch.setattr(checkpoint, name, counted(getattr(checkpoint, name)))
        result = search(str(folder), TARGET, SPACE, DATA, Output(out), SPEC, QUIET)
    return out, result


def weights(out):
    files = TensorFiles(out)
    return {name: files.get(name) for name in files.entries}


def same_weights(left, right):
    left, right = weights(left), weights(right)
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def test_the_result_is_what_is_written(finished):
    out, result = finished
    assert from_dict(SearchResult, read_json(out / "search.json")) == shareable(result)
    assert result.chosen in result.choice
    assert [each.compressed for each in result.finalists] == list(result.choice)
    assert result.trials == len(result.measured) >= SPEC.trials
    assert len(result.groups) == 8
    assert sorted(each.number for each in result.measured) == list(range(1, result.trials + 1))
    assert result.measured[0].kl == min(each.kl for each in result.measured if each.complete)


def test_the_base_is_opened_hashed_and_loaded_once(finished, openings):
    assert sorted(openings) == ["_open_folder", "hash_and_inspect", "load_model"]


def test_a_model_in_memory_gives_the_same_and_stays_as_it_is(finished, folder, tmp_path):
    """Over the finished output of something else, which is not continued but may be replaced."""
    out, result = finished
    place = Output(tmp_path / "out", resume=True)
    compress(folder, place, Recipe(quant=QuantSpec()), DATA, QUIET)
    with pytest.raises(InputError, match=r"finished, with another command"):
        search(folder, TARGET, SPACE, DATA, place, SPEC, QUIET)
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    place = replace(place, overwrite=True)
    again = search(model, TARGET, SPACE, DATA, place, SPEC, QUIET)
    assert again.measured == result.measured
    assert (again.chosen, again.choice) == (result.chosen, result.choice)
    assert same_weights(out, tmp_path / "out")
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_resume_on_a_finished_output_says_so_for_the_same_search_alone(finished, folder, capsys):
    out, result = finished
    again = Output(out, resume=True)
    assert search(folder, TARGET, SPACE, DATA, again, SPEC, replace(QUIET, quiet=False)) == result
    assert f"already done: {out}" in " ".join(capsys.readouterr().err.split())
    others = {
        "target": (folder, Target(tcr=0.79), SPACE, DATA, again, SPEC, QUIET),
        "data": (folder, TARGET, SPACE, Calibration(IDS.flip(0)), again, SPEC, QUIET),
        "model": (tiny_model("llama", seed=1), TARGET, SPACE, DATA, again, SPEC, QUIET),
        "levels": (folder, TARGET, replace(SPACE, levels=SPACE.levels[1:]), DATA, again, SPEC, QUIET),
        "trials": (folder, TARGET, SPACE, DATA, again, replace(SPEC, trials=30), QUIET),
        "objective": (folder, TARGET, SPACE, DATA, again, replace(SPEC, objective=Objective("top1")),
                      QUIET),
        "seed": (folder, TARGET, SPACE, DATA, again, SPEC, replace(QUIET, seed=1)),
        "format": (folder, TARGET, SPACE, DATA, replace(again, format="dense"), SPEC, QUIET),
    }  # fmt: skip
    before = {path: path.read_bytes() for path in out.iterdir()}
    for name, arguments in others.items():
        with pytest.raises(InputError, match=f"is finished, with another {name}: choose another"):
            search(*arguments)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_search_can_be_continued_with_more_trials(folder, finished, tmp_path, monkeypatch):
    """A run that was killed among its finalists, and another that goes on from what it measured; of a model
    that is open, which is taken as it is."""
    out, opened = Output(tmp_path / "out"), open_model(folder)

    def killed(opened, output, *rest):
        record = compress(opened, output, *rest)
        if "searched" in str(output.path):
            raise KeyboardInterrupt
        return record

    monkeypatch.setattr(pipeline, "compress", killed)
    with pytest.raises(KeyboardInterrupt, match="--resume continues"):
        search(opened, TARGET, SPACE, DATA, out, SPEC, QUIET)
    monkeypatch.setattr(pipeline, "compress", compress)
    more = replace(SPEC, trials=20)
    result = search(opened, TARGET, SPACE, DATA, replace(out, resume=True), more, QUIET)
    assert result.trials == 20
    before = {(each.levels, each.kl) for each in finished[1].measured}
    assert before <= {(each.levels, each.kl) for each in result.measured}


@pytest.mark.parametrize("measure", ["kl", "semantic", "sr"])
def test_finalists_are_chosen_and_measured_on_different_data(
    measure, folder, tmp_path, monkeypatch
):
    """What evaluate() is really given, in both of its turns, and what it is asked to make of it."""
    calls = []
    evaluate = pipeline.evaluate

    def watched(base, compressed, text, tasks, semantic, options):
        calls.append((text, tasks, semantic))
        return evaluate(base, compressed, text, tasks, semantic, options)

    monkeypatch.setattr(pipeline, "evaluate", watched)
    model, length = ("bundled", 64) if measure == "sr" else (folder, 36)  # tasks need a tokenizer
    spec = SearchSpec(trials=1, objective=Objective(measure, limit=6))
    space = SearchSpace((CompressionLevel(0.0, 3), CompressionLevel(0.25, 4)))
    out, data = tmp_path / "out", Calibration("self", 4, length)
    result = search(model, Target(tcr=0.8125), space, data, Output(out), spec, QUIET)
    assert len(calls) == 2
    texts = [text for text, _, _ in calls]
    record = from_dict(RunRecord, read_json(out / "srcr.json"))
    seen = set(record.calibration.rows)
    assert len(seen) == 4
    for text in texts:
        assert seen.isdisjoint(text.row_hashes())
    assert rows(texts[0]).isdisjoint(rows(texts[1]))
    if measure == "semantic":
        choice, test = (semantic.prompts for _, _, semantic in calls)
        assert rows(choice).isdisjoint(rows(test))
        for prompts, text in zip((choice, test), texts, strict=True):
            assert rows(prompts) <= {row[:32] for row in rows(text)}
            assert len(rows(prompts)) > 50
        assert all(each.semantic.n == len(rows(test)) for each in result.finalists)
    if measure == "sr":
        assert [tasks.part for _, tasks, _ in calls] == ["choice", "test"]
        assert all(each.sr is not None for each in result.finalists)
    value = result.choice[result.chosen].value
    best = min if measure == "kl" else max
    assert value == best(score.value for score in result.choice.values())


def rows(tokens):
    return {tuple(row) for row in tokens.input_ids.tolist()}


def test_the_smallest_that_keeps_enough(folder, tmp_path):
    constraint, spec = Constraint(Objective("kl"), 0.05), SearchSpec(4, tcr_precision=0.04)
    result = search(folder, constraint, SPACE, DATA, Output(tmp_path / "out"), spec, QUIET)
    rates = {each.compressed: each.rates.tcr for each in result.finalists}
    held = [name for name, score in result.choice.items() if score.value <= 0.05]
    assert result.chosen in held
    assert result.target == constraint
    assert rates["allocated"] > 0.6
    tight = Constraint(Objective("kl"), 1e-9)
    with pytest.raises(SrcrError, match="no plan meets kl<=1e-09"):
        search(
            folder,
            tight,
            SPACE,
            DATA,
            Output(tmp_path / "no"),
            replace(spec, tcr_precision=0.1),
            QUIET,
        )


def test_a_budget_that_is_too_small_is_refused_before_the_work(folder, tmp_path):
    little = replace(QUIET, memory="50MB")
    with pytest.raises(InputError, match="--memory 50MB is too little for this search") as refused:
        search(folder, TARGET, SPACE, DATA, Output(tmp_path / "out"), SHORT, little)
    assert list(tmp_path.iterdir()) == []
    smallest = str(refused.value).partition("use at least ")[2]
    enough = replace(QUIET, memory=smallest)
    search(folder, TARGET, SPACE, DATA, Output(tmp_path / "out"), SHORT, enough)
    assert (tmp_path / "out/search.json").is_file()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Calibration("self", 0), "samples 0 must be at least 1"),
        (Calibration("self", -3), "samples -3 must be at least 1"),
        (Calibration("self", 4, 0), "seq-len 0 must be at least 2"),
        (Calibration(IDS[:6]), "6 sequences, 6 of them different: a search calibrates"),
    ],
)
def test_data_that_cannot_be_used(data, message, folder, tmp_path):
    with pytest.raises(InputError, match=message):
        search(folder, TARGET, SPACE, data, Output(tmp_path / "out"), SPEC, QUIET)
    assert list(tmp_path.iterdir()) == []


def test_an_output_of_an_earlier_version_is_not_continued(finished, folder, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    data = read_json(out / "search.json")
    del data["settings"], data["fingerprint"]
    (out / "search.json").write_text(to_json(data))
    with pytest.raises(InputError, match="is finished, with another version of srcr"):
        search(folder, TARGET, SPACE, DATA, Output(out, resume=True), SPEC, QUIET)


def test_a_model_in_memory_is_not_for_other_machines(tmp_path):
    spec = replace(SPEC, resources=Resources(ray="local"))
    with pytest.raises(InputError, match="--ray local: the workers open the model by its folder"):
        search(tiny_model("llama"), TARGET, SPACE, DATA, Output(tmp_path / "out"), spec, QUIET)


def test_what_was_chosen_is_trained_and_measured_as_the_others(tmp_path):
    base = save_tiny_model(tmp_path / "base", "llama")
    rows = torch.randint(3, 96, (400, 24), generator=torch.Generator().manual_seed(1))
    space = SearchSpace(
        level_grid([0.0, 0.25], [2, 3]), PruneSpec("magnitude"), QuantSpec("rtn", group_size=-1)
    )
    spec = SearchSpec(trials=4, recovery=RecoverySpec(steps=40, batch=16, lr=2e-3, scale_lr=3e-3))
    out = tmp_path / "out"
    result = search(base, Target(tcr=0.85), space, Calibration(rows), Output(out), spec, QUIET)
    assert result.chosen.endswith(", trained")
    after = result.finalists[-1]
    plain = result.chosen.removesuffix(", trained")
    before = next(each for each in result.finalists if each.compressed == plain)
    assert after.compressed == result.chosen
    assert after.divergence.kl.value < before.divergence.kl.value
    assert after.plan == before.plan
    assert result.choice[result.chosen].kl.value < result.choice[plain].kl.value
    assert from_yaml(RunRecord, out / "srcr.json").recoveries[0].accepted
    assert not (out / "trained").exists()
    untrained = replace(spec, recovery=None)
    with pytest.raises(InputError, match="another training"):
        search(
            base,
            Target(tcr=0.85),
            space,
            Calibration(rows),
            Output(out, resume=True),
            untrained,
            QUIET,
        )
