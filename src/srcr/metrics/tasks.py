"""Scores on tasks, item by item: the bundled sets, and whatever lm-evaluation-harness runs.

:func:`resolve_tasks` turns names into tasks with their data, so that a misspelt name or a missing data set
stops before any model is loaded; :func:`run_tasks` scores a model on all of them. Comparing two models is for
others: the items come in the same order each time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from srcr import bundled
from srcr.data.splits import ItemPart
from srcr.errors import InputError
from srcr.metrics.harness import (
    HarnessName,
    ItemSelection,
    ItemsScored,
    OnShare,
    find_tasks,
    load_subtasks,
    score_subtasks,
)

#: The harness's groups that "paper" stands for; docs/tasks.md says why these.
PAPER = ("leaderboard_mmlu_pro", "leaderboard_bbh", "leaderboard_math_hard")


@dataclass(frozen=True)
class TaskSpec:
    """Tasks by name ("bundled", "paper", lm-evaluation-harness names, folders), at most ``limit`` items
    of each; ``part``: of a half of its items (None: of all); ``chat``: whether the harness asks through the
    tokenizer's chat template.

    >>> TaskSpec(("bundled",), limit=500).names
    ('bundled',)
    """

    names: tuple[str, ...]
    limit: int | None = None
    part: ItemPart | None = None
    chat: bool = False

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit {self.limit} must be at least 1 item a task")


@dataclass(frozen=True)
class TaskResult:
    """A model on a task: a score (mostly 0 or 1) for each item, and what guessing would score."""

    name: str
    metric: str
    chance: float
    correct: tuple[float, ...]


@dataclass(frozen=True)
class Task:
    """A name for the report, and the function that scores a model: (model, tokenizer, selection,
    on_progress), the last one told the share that is done."""

    name: str
    score: Callable[[Any, Any, ItemSelection, OnShare], TaskResult]


def resolve_tasks(names: Sequence[str]) -> tuple[Task, ...]:
    """The tasks, with the data of those that lm-evaluation-harness runs.

    A name is ``bundled``, ``paper``, a task, group or tag of the harness, or (anything with a slash
    in it) a folder of task files, which stands for every task in it.

    Raises:
        InputError: a name is unknown or comes twice, its data cannot be had, it has no items or none
            that srcr can score, or the harness is not installed.
    """
    known = [task for name in dict.fromkeys(names) for task in _expand(name)]
    if not known:
        raise InputError("no task was given: name 'bundled', 'paper', a harness task or a folder")
    seen: set[str] = set()
    for task in known:
        name = task if isinstance(task, str) else task.name
        if name in seen:
            raise InputError(f"task {name!r} comes twice: leave one of them out")
        seen.add(name)
    return tuple(_load(task) for task in known)


def run_tasks(
    tasks: Sequence[Task],
    model: torch.nn.Module,
    tokenizer: Any,
    selection: ItemSelection = ItemSelection(),
    on_progress: Callable[[float, str], None] = lambda done, name: None,
) -> dict[str, TaskResult]:
    """The results of a model on all tasks by name; ``on_progress`` hears how many are done, and which is
    running.

    With a limit, that many items: the first of each (sub)task of the harness, a draw by the seed of a bundled
    set. The seed also draws examples that go before a question, where a task draws them.

    Raises:
        InputError: a task cannot be run on this model.
    """
    results = {}
    for done, task in enumerate(tasks):
        on_progress(done, task.name)

        def watch(share: float, done: int = done, name: str = task.name) -> None:
            on_progress(done + share, name)

        results[task.name] = task.score(model, tokenizer, selection, watch)
    on_progress(len(tasks), "")
    return results


def _expand(name: str) -> list[str | HarnessName]:
    """The tasks of a name; bundled ones by their own names."""
    if name == "bundled":
        return list(bundled.TASKS)
    if name == "paper":
        return [task for group in PAPER for task in find_tasks(group)]
    return list(find_tasks(name))


def _load(task: str | HarnessName) -> Task:
    if isinstance(task, str):
        return Task(task, partial(_score_bundled, task))
    return Task(task.name, partial(_score_harness, task.name, load_subtasks(task)))


def _score_bundled(
    name: str,
    model: torch.nn.Module,
    tokenizer: Any,
    selection: ItemSelection,
    on_progress: OnShare,
) -> TaskResult:
    items = bundled.tasks()[name]
    items = [items[i] for i in selection.drawn(len(items), name)]
    correct = bundled.score(model, tokenizer, items, on_progress)
    chance = float(np.mean([1 / len(item.choices) for item in items]))
    return TaskResult(name, "acc", chance, tuple(map(float, correct)))


def _score_harness(
    name: str,
    subtasks: Mapping[str, Any],
    model: torch.nn.Module,
    tokenizer: Any,
    selection: ItemSelection,
    on_progress: OnShare,
) -> TaskResult:
    parts = score_subtasks(name, subtasks, model, tokenizer, selection, on_progress)
    return pool_items(name, parts)


def pool_items(name: str, parts: Sequence[ItemsScored]) -> TaskResult:
    """The result of a task or group: all items of its (sub)tasks, each of which counts the same."""
    return TaskResult(
        name,
        metric="+".join(dict.fromkeys(part.metric for part in parts)),
        chance=float(np.mean([chance for part in parts for chance in part.chances])),
        correct=tuple(score for part in parts for score in part.scores),
    )
