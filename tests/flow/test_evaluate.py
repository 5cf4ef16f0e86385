"""srcr evaluate and srcr report as a user runs them: tasks, meaning, several candidates, the page."""

import json
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from srcr.bundled import chance, model_path
from srcr.data.specs import Calibration, EvaluationText
from srcr.formats import load
from srcr.metrics.specs import SemanticSpec
from srcr.metrics.tasks import TaskSpec
from srcr.models.load import load_tokenizer
from srcr.pipelines.compress import compress
from srcr.pipelines.evaluate import evaluate
from srcr.pipelines.options import Output, RunOptions
from srcr.plans.plan import Recipe
from srcr.plans.specs import QuantSpec
from srcr.serialize import to_dict

pytestmark = pytest.mark.slow

QUIET = RunOptions(quiet=True)
TEXT = ["--text", "bundled", "--samples", 4, "--seq-len", 64]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The bundled model at 2 bits: something is lost."""
    out = tmp_path_factory.mktemp("evaluate") / "small"
    recipe = Recipe(quant=QuantSpec(num_bits=2))
    compress("bundled", Output(out), recipe, Calibration("bundled", 8, 64), QUIET)
    return out


@pytest.fixture(scope="module")
def measured(small):
    """The whole measurement of a candidate."""
    (evaluation,) = evaluate(
        "bundled", [small], EvaluationText("bundled", 4, 64), TaskSpec(("bundled",), 60),
        SemanticSpec(n=12, prompt_len=8, max_new_tokens=8, scorer="base"), QUIET,
    )  # fmt: skip
    return evaluation


def test_tasks_sr_and_srcr(measured):
    assert set(measured.tasks) == {"knowledge", "reasoning", "arithmetic"}
    kept = []
    for name, task in measured.tasks.items():
        items = measured.items[name]
        assert task.n == len(items.base) == len(items.compressed) == 60
        assert task.base == pytest.approx(sum(items.base) / 60)
        assert task.compressed == pytest.approx(sum(items.compressed) / 60)
        assert task.chance == pytest.approx(chance(name), abs=0.05)
        above = max(0, task.compressed - task.chance)
        kept.append(above / (task.base - task.chance))
        assert task.retention == pytest.approx(kept[-1])
        assert task.ci95[0] <= task.retention <= task.ci95[1]
        assert 0 <= task.p_value <= 1
    assert measured.sr == pytest.approx(sum(kept) / 3)
    assert measured.sr_ci95[0] <= measured.sr <= measured.sr_ci95[1]
    assert measured.srcr == pytest.approx(measured.sr * 0.75)  # 2 bits: log2(16 / 2) / 4
    assert measured.sr < 1


def test_meaning(measured):
    meaning = measured.semantic
    assert meaning.n == 12
    assert meaning.max_new_tokens == 8
    expected = (meaning.consistency - meaning.chance) / (1 - meaning.chance)
    assert meaning.normalised == pytest.approx(expected)
    assert len(meaning.worst) == 10
    assert meaning.scorer.startswith("hidden states")


def test_the_rates_name_what_they_include(measured):
    assert set(measured.includes) >= {"tcr", "base_bytes", "stored_bytes", "loaded_bytes"}
    assert 0 < measured.rates.entropy_bits <= 2


def test_many_candidates_cost_a_single_pass_of_the_base(small, tmp_path):
    """Every forward pass of the base is counted, through all three measures."""
    many = [shutil.copytree(small, tmp_path / str(i)) for i in range(4)]
    base, passes = load("bundled"), []
    base.register_forward_hook(lambda *_: passes.append(1))
    pair = base, load_tokenizer(model_path())
    counts = []
    for candidates in (many[:1], many):
        passes.clear()
        evaluations = evaluate(
            pair, candidates, EvaluationText("bundled", 4, 64), TaskSpec(("bundled",), 5),
            SemanticSpec(n=4, prompt_len=4, max_new_tokens=4, scorer="base"), QUIET,
        )  # fmt: skip
        counts.append(len(passes) - len(candidates))  # scoring texts by the base's hidden states
        alike = {
            json.dumps({**to_dict(each), "seconds": 0, "compressed": ""}) for each in evaluations
        }
        assert len(alike) == 1
    assert abs(counts[0] - counts[1]) <= 3  # the embeddings of each candidate's continuations


def test_models_in_memory_give_the_same_and_stay_as_they_are(small, measured):
    base, candidate = load("bundled"), load(small)
    before = candidate.state_dict()["model.norm.weight"].clone(), candidate.dtype
    tokenizer = load_tokenizer(model_path())
    (evaluation,) = evaluate(
        (base, tokenizer), [(candidate, tokenizer)], EvaluationText("bundled", 4, 64),
        TaskSpec(("bundled",), 60), None, QUIET,
    )  # fmt: skip
    assert evaluation.divergence == measured.divergence
    assert evaluation.tasks == measured.tasks
    assert evaluation.rates.source == "config and weights"
    assert candidate.dtype == before[1]
    assert torch.equal(candidate.state_dict()["model.norm.weight"], before[0])


def test_a_base_at_chance_leaves_sr_undefined(tmp_path, srcr):
    """An untrained model guesses: nothing to retain, no division by zero."""
    from transformers import AutoConfig, AutoTokenizer

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(model_path())
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "untrained")
    AutoTokenizer.from_pretrained(model_path()).save_pretrained(tmp_path / "untrained")
    options = [*TEXT, "--tasks", "bundled", "--limit", 30, "--json"]
    result = srcr("evaluate", tmp_path / "untrained", tmp_path / "untrained", *options)
    assert result.code == 0, result.err
    data = result.json()
    undefined = [task for task in data["tasks"].values() if task["retention"] is None]
    assert undefined
    assert all("at chance" in task["note"] for task in undefined)
    assert (data["sr"] is None) == (data["srcr"] is None) == (len(undefined) == 3)


def test_removed_channels_count_as_sparsity(tmp_path, srcr):
    """A candidate whose FFN has half the channels of the base."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
    folders = []
    for width in (128, 64):
        config = LlamaConfig(**sizes, intermediate_size=width, num_key_value_heads=2)
        folders.append(tmp_path / str(width))
        AutoModelForCausalLM.from_config(config).save_pretrained(folders[-1])
    result = srcr("evaluate", *folders, "--samples", 2, "--seq-len", 16, "--json")
    assert result.code == 0, result.err
    rates = result.json()["rates"]
    attention, ffn = 64 * 64 * 2 + 64 * 32 * 2, 3 * 64 * 128
    removed = (ffn / 2) / (attention + ffn)
    assert rates["sparsity"] == pytest.approx(removed)
    assert rates["tcr"] == pytest.approx(removed)
    assert rates["bits"] == 16


def test_report_into_the_folder_and_across_folders(small, srcr, tmp_path):
    options = [*TEXT, "--tasks", "bundled", "--limit", 20, "--report", "--overwrite"]
    result = srcr("evaluate", "bundled", small, *options)
    assert result.code == 0, result.err
    kept = json.loads((small / "evaluation.json").read_text())
    assert kept["command"].startswith("srcr evaluate bundled")
    card = (small / "README.md").read_text()
    assert re.search(rf"\| Sr \| {kept['sr']:.3f} \|", card)
    assert card.count("<!-- evaluation -->") == 1
    page = (small / "report.html").read_text(encoding="utf-8")
    assert "<!doctype html>" in page[:200].lower()
    whole = tmp_path / "all.html"
    assert srcr("report", small, "-o", whole).code == 0
    assert whole.stat().st_size < 2_000_000
    again = srcr("report", small, "-o", whole)
    assert again.code == 2
    assert "--overwrite" in again.error()
    assert AutoModelForCausalLM.from_pretrained(small) is not None  # still a model folder


def test_a_report_without_an_evaluation_says_how_to_get_one(small, srcr, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("srcr.json", "plan.yaml"):
        (bare / name).write_bytes((small / name).read_bytes())
    assert srcr("report", bare, "-o", tmp_path / "bare.html").code == 0
    assert "srcr evaluate" in (tmp_path / "bare.html").read_text(encoding="utf-8")


def test_a_report_of_nothing(srcr, tmp_path):
    result = srcr("report", tmp_path / "no", "-o", tmp_path / "x.html")
    assert result.code == 2
    assert not (tmp_path / "x.html").exists()


@pytest.mark.parametrize("wider", ["version", "base"])
def test_a_token_beyond_the_model_makes_no_other_tokenizer(srcr, stories, ids, tmp_path, wider):
    """What is added for training (a padding token) is no id that the model can be given."""
    paths = {"version": tmp_path / "version", "base": tmp_path / "base"}
    for path in paths.values():
        shutil.copytree(stories, path)
    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(paths[wider])
    assert srcr("evaluate", paths["base"], paths["version"], "--text", ids).code == 0


@pytest.mark.parametrize("broken", ["version", "base"])
def test_a_tokenizer_that_cannot_be_loaded_stops_nothing_that_needs_none(
    srcr, stories, ids, tmp_path, broken
):
    paths = {"version": tmp_path / "version", "base": tmp_path / "base"}
    for path in paths.values():
        shutil.copytree(stories, path)
    for path in paths[broken].glob("tokenizer*"):
        path.unlink()
    (paths[broken] / "tokenizer_config.json").write_text('{"tokenizer_class": "XTokenizer"}')
    assert srcr("evaluate", paths["base"], paths["version"], "--text", ids).code == 0
    out = tmp_path / "out"
    options = ["--sparsity", 0.25, "--prune-method", "magnitude", "--samples", 2, "--seq-len", 8]
    assert srcr("compress", paths[broken], "-o", out, *options).code == 0
    assert (out / "tokenizer_config.json").is_file()
