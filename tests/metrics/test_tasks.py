"""Tasks on real models: the bundled sets, and local task folders that lm-evaluation-harness runs."""

import builtins
import copy
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from srcr import bundled
from srcr.bundled.task_folder import write_task_folder
from srcr.errors import InputError
from srcr.metrics.harness import HarnessName, ItemSelection, load_subtasks, score_subtasks
from srcr.metrics.tasks import PAPER, pool_items, resolve_tasks, run_tasks
from srcr.models.load import load_model, load_tokenizer

DATA = Path(__file__).parents[3] / "shared/data"
COMPARED = 16
needs_shared = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not there")


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    """So small a model gains nothing from a second thread, and loses much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny() -> tuple[torch.nn.Module, Any]:
    folder = bundled.model_path()
    return load_model(folder, torch.float32), load_tokenizer(folder)


@pytest.fixture(scope="module")
def loaded(stories: Path) -> tuple[torch.nn.Module, Any]:
    return load_model(stories, torch.float32), load_tokenizer(stories)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, without the hub client's retries."""
    for module in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], **config: Any) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    task = {"task": name, **files, "test_split": "test", **config}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def choice(**config: Any) -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    } | config


def generation(most: int, **config: Any) -> dict[str, Any]:
    return {
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": most, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    } | config


# --- the bundled sets


def test_bundled_tasks_score_every_item(tiny: tuple[torch.nn.Module, Any]) -> None:
    tasks = resolve_tasks(["bundled"])
    heard: list[tuple[float, str]] = []
    results = run_tasks(
        tasks, *tiny, ItemSelection(8), lambda done, name: heard.append((done, name))
    )
    assert tuple(results) == bundled.TASKS
    assert heard[-1] == (3, "")
    assert heard == sorted(heard, key=lambda pair: pair[0])
    assert {name for _, name in heard[:-1]} == set(bundled.TASKS)
    assert {int(done) for done, _ in heard} == {0, 1, 2, 3}
    for name, result in results.items():
        assert (result.name, result.metric, len(result.correct)) == (name, "acc", 8)
        assert set(result.correct) <= {0.0, 1.0}
        assert 0 < result.chance < 1


def test_a_limited_bundled_task_scores_the_items_that_are_drawn(
    tiny: tuple[torch.nn.Module, Any],
) -> None:
    items = bundled.tasks()["reasoning"]
    task = next(task for task in resolve_tasks(["bundled"]) if task.name == "reasoning")
    heard: list[float] = []
    for selection in (ItemSelection(24), ItemSelection(12, "choice", seed=3)):
        heard.clear()
        chosen = [items[i] for i in selection.drawn(len(items), "reasoning")]
        result = task.score(*tiny, selection, heard.append)
        assert result.correct == tuple(map(float, bundled.score(*tiny, chosen)))
        assert result.chance == pytest.approx(np.mean([1 / len(item.choices) for item in chosen]))
        assert heard == sorted(heard)
        assert 0 < heard[0] <= heard[-1] == 1


def test_limit_draws_the_same_items_again_and_others_with_another_seed() -> None:
    again = [ItemSelection(12, seed=seed).drawn(1000, "reasoning") for seed in (1, 1, 2)]
    assert again[0] == again[1] != again[2]
    assert again[0] != ItemSelection(12, seed=1).drawn(1000, "knowledge")
    for drawn in again:
        assert drawn == sorted(set(drawn))
        assert len(drawn) == 12
        assert set(drawn) < set(range(1000))
    everything = list(range(24))
    for limit in (None, 24, 25):
        assert ItemSelection(limit, seed=1).drawn(24, "reasoning") == everything


def test_no_name_is_refused_and_a_name_given_twice_counts_once() -> None:
    with pytest.raises(InputError, match="no task was given"):
        resolve_tasks([])
    assert tuple(task.name for task in resolve_tasks(["bundled", "bundled"])) == bundled.TASKS


def test_without_the_harness_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("lm_eval"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in ("hellaswag", "paper", "./somewhere"):
        with pytest.raises(InputError, match=r"pip install 'srcr\[tasks\]'"):
            resolve_tasks([name])


@pytest.mark.parametrize(
    "take", [ItemSelection.drawn, ItemSelection.first], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("count", [24, 25])
def test_the_parts_of_a_task_share_no_item(
    count: int, take: Callable[[ItemSelection, int, str], list[int]]
) -> None:
    """A search chooses by one half of the items and measures on the other."""
    first = take(ItemSelection(part="choice"), count, "reasoning")
    second = take(ItemSelection(part="test"), count, "reasoning")
    assert sorted(first + second) == list(range(count))
    assert abs(len(first) - len(second)) <= 1
    limited = take(ItemSelection(5, part="test"), count, "reasoning")
    assert len(limited) == 5
    assert set(limited) < set(second)


# --- the harness


@pytest.fixture(scope="module")
def harness() -> None:
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")


@pytest.mark.usefixtures("harness")
def test_the_harness_agrees_on_every_bundled_item(
    tmp_path: Path, tiny: tuple[torch.nn.Module, Any]
) -> None:
    names = write_task_folder(tmp_path)
    tasks = resolve_tasks([f"{tmp_path}/"])
    assert {task.name for task in tasks} == set(names)
    results = run_tasks(tasks, *tiny, ItemSelection(COMPARED))
    for name, items in bundled.tasks().items():
        result = results[f"srcr_{name}"]
        assert result.metric == "acc"
        assert result.correct == tuple(map(float, bundled.score(*tiny, items[:COMPARED])))
        assert result.chance == pytest.approx(
            np.mean([1 / len(i.choices) for i in items[:COMPARED]])
        )


@pytest.mark.usefixtures("harness")
def test_questions_go_through_the_chat_template(
    tmp_path: Path, loaded: tuple[torch.nn.Module, Any]
) -> None:
    """What the template puts around a question is what a task without it would have there."""
    model, tokenizer = loaded[0], copy.deepcopy(loaded[1])
    tokenizer.chat_template = (
        "{% for m in messages %}Tell: {{ m['content'] }} Then{% endfor %}"
        "{% if add_generation_prompt %} so{% endif %}"
    )
    rows = [
        {"q": f"{name} had a {thing}.", "choices": ["she was happy", "he was sad"], "answer": 0}
        for name in ("Lily", "Tom", "Sue") for thing in ("ball", "dog", "red car")
    ]  # fmt: skip
    choice = {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
    }
    write_task(tmp_path, "asked", rows, doc_to_text="{{q}}", **choice)
    choice["target_delimiter"] = ""  # a template says itself what stands before an answer
    write_task(tmp_path, "written", rows, doc_to_text="Tell: {{q}} Then so", **choice)
    tasks = {task.name: task for task in resolve_tasks([f"{tmp_path}/"])}
    chat = run_tasks([tasks["asked"]], model, tokenizer, ItemSelection(chat=True))
    written = run_tasks([tasks["written"]], model, tokenizer)
    plain = run_tasks([tasks["asked"]], model, tokenizer)
    assert chat["asked"].correct == written["written"].correct
    assert plain["asked"].correct != written["written"].correct


@needs_shared
@pytest.mark.usefixtures("harness")
def test_pairs_choices_and_generation_from_a_local_folder(
    tmp_path: Path, loaded: tuple[torch.nn.Module, Any]
) -> None:
    blimp = (DATA / "blimp" / "anaphor_number_agreement.jsonl").read_text().splitlines()
    pairs = [json.loads(line) for line in blimp]
    write_task(tmp_path, "pairs", pairs, **choice(
        doc_to_text="", doc_to_choice="{{[sentence_good, sentence_bad]}}", doc_to_target=0,
    ))  # fmt: skip
    bbh = json.loads((DATA / "bbh" / "boolean_expressions.json").read_text())["examples"]
    write_task(tmp_path, "boolean", bbh, **choice(
        doc_to_text="{{input}}", doc_to_choice=["True", "False"], doc_to_target="target",
        num_fewshot=2,
    ))  # fmt: skip
    write_task(tmp_path, "boolean_generated", bbh, **generation(
        4, doc_to_text="Q: {{input}}\nA:", doc_to_target="{{target}}",
    ))  # fmt: skip
    gsm8k = [json.loads(line) for line in (DATA / "gsm8k_test.jsonl").open()][:20]
    number = {"function": "regex", "regex_pattern": r"(-?[0-9]+)"}
    anything = {"function": "regex", "regex_pattern": r"(.)"}
    write_task(tmp_path, "gsm8k", gsm8k, **generation(
        8, doc_to_text="Question: {{question}}\nAnswer:",
        doc_to_target="{{answer.split('#### ')[-1]}}",
        filter_list=[
            {"name": "number", "filter": [number, {"function": "take_first"}]},
            {"name": "anything", "filter": [anything, {"function": "take_first"}]},
        ],
    ))  # fmt: skip

    tasks = resolve_tasks([f"{tmp_path}/"])
    heard: list[float] = []
    results = run_tasks(tasks, *loaded, ItemSelection(6), lambda done, _: heard.append(done))
    assert heard == sorted(heard)
    assert len(heard) > 2 * len(tasks)  # within a task, too
    assert results == run_tasks(
        tasks, *loaded, ItemSelection(6)
    )  # loaded once, run on several models
    assert {name: (r.metric, r.chance, len(r.correct)) for name, r in results.items()} == {
        "boolean": ("acc", 0.5, 6),
        "boolean_generated": ("exact_match", 0.0, 6),
        "gsm8k": ("exact_match", 0.0, 6),  # of the first filter alone
        "pairs": ("acc", 0.5, 6),
    }
    halves = [
        run_tasks(tasks[:1], *loaded, ItemSelection(3, part))[tasks[0].name].correct
        for part in ("choice", "test")
    ]
    assert [len(half) for half in halves] == [3, 3]
    assert results["pairs"].correct == tuple(_better(*loaded, pair) for pair in pairs[:6])
    assert all(set(result.correct) <= {0.0, 1.0} for result in results.values())


def _better(model: torch.nn.Module, tokenizer: Any, pair: dict[str, Any]) -> float:
    """Whether the good sentence is likelier, each after the model's first token."""
    losses = []
    for key in ("sentence_good", "sentence_bad"):
        ids = tokenizer(f" {pair[key]}", add_special_tokens=False, return_tensors="pt").input_ids
        ids = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids], 1)
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1))
    return float(losses[0] < losses[1])


@pytest.mark.usefixtures("harness")
def test_the_items_of_a_tag_are_pooled_and_chance_is_weighted_by_them(
    tmp_path: Path, tiny: tuple[torch.nn.Module, Any]
) -> None:
    from lm_eval.tasks import TaskManager

    rows = [
        {"q": "2 + 2 =", "c": [" 4.", " 5."], "a": 0},
        {"q": "3 - 1 =", "c": [" 2.", " 7."], "a": 0},
    ]
    keys = {"doc_to_text": "q", "doc_to_choice": "c", "doc_to_target": "a", "target_delimiter": ""}
    write_task(tmp_path, "two", rows, **choice(tag="sums", **keys))
    four = [row | {"c": [*row["c"], " 8.", " 9."]} for row in rows[:1]]
    write_task(tmp_path, "four", four, **choice(tag="sums", **keys))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    subtasks = load_subtasks(HarnessName("sums", manager))
    parts = score_subtasks("sums", subtasks, *tiny, ItemSelection(), lambda share: None)
    result = pool_items("sums", parts)
    assert (result.name, result.metric, len(result.correct)) == ("sums", "acc", 3)
    assert result.correct == tuple(score for part in parts for score in part.scores)
    assert result.chance == pytest.approx((0.5 + 0.5 + 0.25) / 3)


@pytest.mark.usefixtures("harness")
def test_a_name_that_two_folders_have_is_refused(tmp_path: Path) -> None:
    rows = [{"q": "2 + 2 =", "c": [" 4.", " 5."], "a": 0}]
    keys = {"doc_to_text": "q", "doc_to_choice": "c", "doc_to_target": "a"}
    for folder in ("left", "right"):
        (tmp_path / folder).mkdir()
        write_task(tmp_path / folder, "two", rows, **choice(**keys))
    with pytest.raises(InputError, match="'two' comes twice"):
        resolve_tasks([f"{tmp_path}/left", f"{tmp_path}/right"])


@pytest.mark.slow
@pytest.mark.usefixtures("harness", "offline")
def test_names_are_checked_before_anything_is_loaded() -> None:
    with pytest.raises(InputError, match=r"unknown task 'helaswag': did you mean .*hellaswag"):
        resolve_tasks(["paper", "helaswag"])
    with pytest.raises(InputError, match=r"unknown task 'bundle': did you mean .*bundled"):
        resolve_tasks(["bundle"])
    with pytest.raises(InputError, match=f"'{PAPER[0]}' cannot be loaded: .*TIGER-Lab/MMLU-Pro"):
        resolve_tasks(["paper"])
    assert logging.getLogger("lm_eval").level == logging.ERROR


@pytest.mark.usefixtures("harness", "offline")
def test_folders_that_cannot_be_used_are_refused(
    tmp_path: Path, loaded: tuple[torch.nn.Module, Any]
) -> None:
    with pytest.raises(InputError, match="does not exist"):
        resolve_tasks([f"{tmp_path}/nowhere/"])
    with pytest.raises(InputError, match="has no task"):
        resolve_tasks([f"{tmp_path}/"])
    (tmp_path / "_shared.yaml").write_text("output_type: multiple_choice\n")
    (tmp_path / "broken.yaml").write_text("task: [\n")
    with pytest.raises(InputError, match=r"broken\.yaml is not a task"):
        resolve_tasks([f"{tmp_path}/"])
    (tmp_path / "broken.yaml").unlink()

    rows = [{"text": "Once upon a time", "answer": "there"}]
    config = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
    }
    perplexity = [{"metric": "word_perplexity", "aggregation": "weighted_perplexity"}]
    write_task(tmp_path, "words", rows, metric_list=perplexity, **config)
    with pytest.raises(InputError, match="words measures perplexity"):
        resolve_tasks([f"{tmp_path}/"])
    config = {"doc_to_text": "{{text}}", "doc_to_target": "{{answer}}"}
    write_task(tmp_path, "words", rows, **generation(4096, **config))
    with pytest.raises(InputError, match="'words' cannot run on this model"):
        run_tasks(resolve_tasks([f"{tmp_path}/"]), *loaded)
    (tmp_path / "words.jsonl").unlink()
    with pytest.raises(InputError, match=r"'words' cannot be loaded: .*words.jsonl"):
        resolve_tasks([f"{tmp_path}/"])
