"""Scores on tasks, item by item: the bundled sets, and whatever lm-evaluation-harness runs.

`resolve_tasks` turns names into tasks with their data, so that a misspelt name or a missing data
set stops before any model is loaded; `run_tasks` scores one model on all of them. Comparing two
models is for others: the items come in the same order each time.
"""

import difflib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from numbers import Real
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch

from srcr import bundled
from srcr.errors import InputError, first_line

PAPER = ("leaderboard_mmlu_pro", "leaderboard_bbh", "leaderboard_math_hard")
"""The harness's groups that `paper` stands for; docs/tasks.md says why these."""

PREFERRED_METRICS = ("acc", "exact_match")
#: The harness keeps the logits of a whole batch, of up to so many tokens a row: at most so many numbers.
BATCH_ROWS, ROW_TOKENS, BATCH_LOGITS = 32, 2048, 1 << 28


OnShare = Callable[[float], None]


@dataclass(frozen=True)
class TaskResult:
    """One model on one task: a score (mostly 0 or 1) for each item, and what guessing would score."""

    name: str
    metric: str
    chance: float
    correct: tuple[float, ...]


@dataclass(frozen=True)
class Task:
    """A name for the report, and the function that scores a model: (model, tokenizer, limit, seed,
    on_progress), the last one told the share that is done."""

    name: str
    score: Callable[[Any, Any, int | None, int, OnShare], TaskResult]


class _Found(NamedTuple):
    """A name that exists, and the harness's task manager that knows it (None: a bundled set)."""

    name: str
    manager: Any


def resolve_tasks(names: Sequence[str]) -> tuple[Task, ...]:
    """Find the tasks, and load the data of those that lm-evaluation-harness runs.

    A name is ``bundled``, ``paper``, a task, group or tag of the harness, or (anything with a slash
    in it) a folder of task files, which stands for every task in it.

    Raises:
        InputError: a name is unknown or comes twice, its data cannot be had, it has no items or none
            that srcr can score, or the harness is not installed.
    """
    found = [task for name in dict.fromkeys(names) for task in _find(name)]
    if not found:
        raise InputError("no task was given: name 'bundled', 'paper', a harness task or a folder")
    seen: set[str] = set()
    for name, _ in found:
        if name in seen:
            raise InputError(f"task {name!r} comes twice: leave one of them out")
        seen.add(name)
    return tuple(_load(task) for task in found)


def run_tasks(
    tasks: Sequence[Task],
    model: torch.nn.Module,
    tokenizer: Any,
    limit: int | None = None,
    seed: int = 0,
    on_progress: Callable[[float, str], None] = lambda done, name: None,
) -> dict[str, TaskResult]:
    """Score one model on all tasks; ``on_progress`` hears how many are done, and which is running.

    With ``limit``, that many items: the first of each (sub)task of the harness, a draw by ``seed`` of
    a bundled set. The seed also draws examples that go before a question, where a task draws them.

    Raises:
        InputError: a task cannot be run on this model.
    """
    results = {}
    for done, task in enumerate(tasks):
        on_progress(done, task.name)

        def watch(share: float, done: int = done, name: str = task.name) -> None:
            on_progress(done + share, name)

        results[task.name] = task.score(model, tokenizer, limit, seed, watch)
    on_progress(len(tasks), "")
    return results


# --- names


def _find(name: str) -> list[_Found]:
    if name == "bundled":
        return [_Found(task, None) for task in bundled.TASKS]
    if name == "paper":
        return [found for task in PAPER for found in _find(task)]
    _require_harness(name)
    if "/" in name or os.sep in name:
        return _find_in_folder(Path(name).expanduser())
    manager = _registry()
    known = manager.all_tasks
    if name not in known:
        near = difflib.get_close_matches(name, ["bundled", "paper", *known], n=4, cutoff=0.6)
        hint = f": did you mean {', '.join(near)}?" if near else "."
        raise InputError(
            f"unknown task {name!r}{hint} Give 'bundled', 'paper', a name that `lm-eval ls tasks` "
            "lists, or a folder of task files with a slash in its name, such as ./tasks"
        )
    return [_Found(name, manager)]


def _find_in_folder(folder: Path) -> list[_Found]:
    from lm_eval.tasks import TaskManager

    if not folder.is_dir():
        raise InputError(f"task folder {folder} does not exist")
    manager = TaskManager(include_path=str(folder.resolve()), include_defaults=False)
    read = {entry.yaml_path for entry in manager.task_index.values()}
    for path in sorted(folder.resolve().rglob("*.yaml")):
        hidden = any(part[0] in "._" for part in path.relative_to(folder.resolve()).parts)
        if path not in read and not hidden:
            raise InputError(
                f"{path} is not a task: its YAML cannot be read, or has no 'task', or has another "
                "file's; start the name of a file that others include with '_'"
            )
    if not manager.all_subtasks:
        raise InputError(f"task folder {folder} has no task (*.yaml with a key 'task')")
    return [_Found(name, manager) for name in manager.all_subtasks]


def _require_harness(name: str) -> None:
    try:
        from lm_eval.api import task as harness
        from lm_eval.models import huggingface  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"task {name!r} needs lm-evaluation-harness ({first_line(error)}): "
            "pip install 'srcr[tasks]'; 'bundled' needs nothing"
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    harness.tqdm = lambda rows, total: rows  # a bar for each subtask that no option turns off


@cache
def _registry() -> Any:
    """All tasks that come with the harness; reading their many files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _load(found: _Found) -> Task:
    name, manager = found
    if manager is None:
        return Task(name, partial(_score_bundled, name))
    try:
        leaves = manager.load([name])["tasks"]
        empty = [leaf for leaf, task in leaves.items() if not len(task.eval_docs)]
    except Exception as error:  # whatever a task's own code, its YAML, or the hub may raise
        raise InputError(
            f"task {name!r} cannot be loaded: {first_line(error)}. Data that is not here comes from "
            "the Hugging Face hub: connect, fill its cache beforehand, or give a local task folder"
        ) from None
    if empty or not leaves:
        raise InputError(f"task {', '.join(empty) or name} has no items: leave it out")
    for leaf, task in leaves.items():
        if reason := _unfit(task):
            raise InputError(f"task {leaf} {reason}: leave it out")
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
    return Task(name, partial(_score_harness, name, leaves))


def _unfit(task: Any) -> str | None:
    if getattr(task, "UNSAFE_CODE", False):
        return "runs code that the model writes, which srcr does not do"
    if getattr(task, "MULTIMODAL", False):
        return "needs more than text"
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return "measures perplexity, which has no items to score"
    return None


# --- scores


def _score_bundled(
    name: str,
    model: torch.nn.Module,
    tokenizer: Any,
    limit: int | None,
    seed: int,
    on_progress: OnShare,
) -> TaskResult:
    items = bundled.tasks()[name]
    if limit is not None and limit < len(items):
        chosen = Random(f"srcr items {name} {seed}").sample(range(len(items)), limit)
        items = [items[i] for i in sorted(chosen)]
    correct = bundled.score(model, tokenizer, items, on_progress)
    chance = float(np.mean([1 / len(item.choices) for item in items]))
    return TaskResult(name, "acc", chance, tuple(map(float, correct)))


def _score_harness(
    name: str,
    leaves: Mapping[str, Any],
    model: torch.nn.Module,
    tokenizer: Any,
    limit: int | None,
    seed: int,
    on_progress: OnShare,
) -> TaskResult:
    """All items of a task's or group's (sub)tasks, pooled."""
    from lm_eval import evaluate

    for task in leaves.values():
        task.set_fewshot_seed(seed)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            found = evaluate(
                _language_model(model, tokenizer, on_progress),
                {"tasks": leaves},
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=False,
            )
    except (AssertionError, ValueError) as error:
        raise InputError(f"task {name!r} cannot run on this model: {first_line(error)}") from error
    parts = [_scores(leaf, task, found["samples"][leaf]) for leaf, task in leaves.items()]
    return TaskResult(
        name,
        metric="+".join(dict.fromkeys(part.metric for part in parts)),
        chance=float(np.mean([chance for part in parts for chance in part.chances])),
        correct=tuple(score for part in parts for score in part.scores),
    )


def _language_model(model: torch.nn.Module, tokenizer: Any, on_progress: OnShare) -> Any:
    """The model as the harness wants it, with a tokenizer it may change, and without its bars: the rows
    that went through the model, of those asked for, are told instead."""
    from lm_eval.models.huggingface import HFLM

    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    rows = max(1, min(BATCH_ROWS, BATCH_LOGITS // (ROW_TOKENS * vocabulary)))
    wrapped = HFLM(pretrained=model, tokenizer=deepcopy(tokenizer), batch_size=rows)
    done, asked = 0, 1

    def begin(kind: Callable[..., Any], requests: Sequence[Any]) -> Any:
        nonlocal done, asked
        done, asked = 0, max(1, len(requests))
        return kind(requests, disable_tqdm=True)

    def step(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal done
        result = call(*args, **kwargs)
        done += len(result)
        on_progress(min(done / asked, 1))
        return result

    for name in ("loglikelihood", "generate_until"):
        setattr(wrapped, name, partial(begin, getattr(wrapped, name)))
    for name in ("_model_call", "_model_generate"):
        setattr(wrapped, name, partial(step, getattr(wrapped, name)))
    return wrapped


class _Scores(NamedTuple):
    metric: str
    chances: list[float]
    scores: list[float]


def _scores(leaf: str, task: Any, samples: Sequence[Mapping[str, Any]]) -> _Scores:
    """The items' scores under the first of the task's answer filters, and the chance of each."""
    rows = [row for row in samples if row["filter"] == samples[0]["filter"]]
    higher_is_better = task.higher_is_better()
    usable = [
        metric
        for metric in rows[0]["metrics"]
        if higher_is_better.get(metric, True)
        and all(isinstance(row[metric], Real | np.bool_) for row in rows)
    ]
    if not usable:
        raise InputError(
            f"task {leaf} has no score for each item where more is better, only "
            f"{', '.join(rows[0]['metrics'])}: leave it out"
        )
    metric = next((metric for metric in PREFERRED_METRICS if metric in usable), usable[0])
    choice = task.OUTPUT_TYPE == "multiple_choice"
    chances = [1 / len(task.doc_to_choice(row["doc"])) if choice else 0.0 for row in rows]
    return _Scores(metric, chances, [float(row[metric]) for row in rows])
