"""Tasks that lm-evaluation-harness knows or that a folder describes, scored item by item."""

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
from typing import Any

import numpy as np
import torch

from srcr.data.splits import ItemPart, item_indices
from srcr.errors import InputError, first_line

PREFERRED_METRICS = ("acc", "exact_match")
#: The harness keeps the logits of a whole batch, of up to so many tokens a row: at most so many numbers.
BATCH_ROWS, ROW_TOKENS, BATCH_LOGITS = 32, 2048, 1 << 28

OnShare = Callable[[float], None]


@dataclass(frozen=True, eq=False)
class HarnessName:
    """A task's name, and the harness's task manager that knows it."""

    name: str
    manager: Any


@dataclass(frozen=True)
class ItemsScored:
    """The items of a (sub)task under a ``metric``: what guessing scores on each, and what the model did."""

    metric: str
    chances: list[float]
    scores: list[float]


@dataclass(frozen=True)
class ItemSelection:
    """Which items of a task are taken: a ``part`` of them (None: all), at most ``limit``, by ``seed``;
    ``chat``: whether they are asked through the tokenizer's chat template."""

    limit: int | None = None
    part: ItemPart | None = None
    seed: int = 0
    chat: bool = False

    def first(self, count: int, name: str) -> list[int]:
        """The first items of the part, of ``count`` that a task has."""
        return item_indices(count, self.part, self.seed, name)[: self.limit]

    def drawn(self, count: int, name: str) -> list[int]:
        """As many items of the part as the limit allows, drawn by the seed, in rising order."""
        indices = item_indices(count, self.part, self.seed, name)
        if self.limit is None or self.limit >= len(indices):
            return indices
        chosen = Random(f"srcr items {name} {self.seed}").sample(range(len(indices)), self.limit)
        return [indices[i] for i in sorted(chosen)]


def find_tasks(name: str) -> list[HarnessName]:
    """The tasks that a name stands for: that of the harness, or those of a folder (with a slash in its name).

    Raises:
        InputError: the harness is not installed, the name is unknown, or a file of the folder is no task.
    """
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
    return [HarnessName(name, manager)]


def _find_in_folder(folder: Path) -> list[HarnessName]:
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
    return [HarnessName(name, manager) for name in manager.all_subtasks]


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


def load_subtasks(task: HarnessName) -> dict[str, Any]:
    """The harness's (sub)tasks of a name, with their data.

    Raises:
        InputError: they cannot be loaded, have no items, or none that srcr can score.
    """
    name = task.name
    try:
        leaves: dict[str, Any] = task.manager.load([name])["tasks"]
        empty = [leaf for leaf, subtask in leaves.items() if not len(subtask.eval_docs)]
    except Exception as error:  # whatever a task's own code, its YAML, or the hub may raise
        raise InputError(
            f"task {name!r} cannot be loaded: {first_line(error)}. Data that is not here comes from "
            "the Hugging Face hub: connect, fill its cache beforehand, or give a local task folder"
        ) from None
    if empty or not leaves:
        raise InputError(f"task {', '.join(empty) or name} has no items: leave it out")
    for leaf, subtask in leaves.items():
        if reason := _unfit(subtask):
            raise InputError(f"task {leaf} {reason}: leave it out")
        if subtask.get_config("num_fewshot") is None:
            subtask.set_config("num_fewshot", 0)
    return leaves


def _unfit(task: Any) -> str | None:
    if getattr(task, "UNSAFE_CODE", False):
        return "runs code that the model writes, which srcr does not do"
    if getattr(task, "MULTIMODAL", False):
        return "needs more than text"
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return "measures perplexity, which has no items to score"
    return None


def score_subtasks(
    name: str,
    subtasks: Mapping[str, Any],
    model: torch.nn.Module,
    tokenizer: Any,
    selection: ItemSelection,
    on_progress: OnShare,
) -> list[ItemsScored]:
    """The scores of a model on the chosen items of each (sub)task of a name.

    Raises:
        InputError: a task cannot run on this model, or has no score for each item.
    """
    from lm_eval import evaluate

    for task in subtasks.values():
        task.set_fewshot_seed(selection.seed)
    samples = None
    if selection.part is not None:
        counts = {leaf: len(task.eval_docs) for leaf, task in subtasks.items()}
        samples = {leaf: selection.first(count, leaf) for leaf, count in counts.items()}
    try:
        with torch.random.fork_rng():
            torch.manual_seed(selection.seed)
            result = evaluate(
                _language_model(model, tokenizer, on_progress),
                {"tasks": dict(subtasks)},
                limit=selection.limit if samples is None else None,
                samples=samples,
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=selection.chat,
            )
    except (AssertionError, ValueError) as error:
        raise InputError(f"task {name!r} cannot run on this model: {first_line(error)}") from error
    return [_scores(leaf, task, result["samples"][leaf]) for leaf, task in subtasks.items()]


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


def _scores(leaf: str, task: Any, samples: Sequence[Mapping[str, Any]]) -> ItemsScored:
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
    return ItemsScored(metric, chances, [float(row[metric]) for row in rows])
