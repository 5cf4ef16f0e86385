"""A tiny Llama that ships with the package, its language, and three task sets for it.

Everything here is invented by a seeded grammar, so that compression can be tried and measured
without any download.
"""

from functools import cache
from pathlib import Path
from random import Random

from srcr.bundled.facts import knowledge_items
from srcr.bundled.grammar import document
from srcr.bundled.items import Item
from srcr.bundled.puzzles import arithmetic_items, reasoning_items
from srcr.bundled.scoring import score

__all__ = ["TASKS", "Item", "chance", "model_path", "score", "tasks", "texts"]

TASKS = ("knowledge", "reasoning", "arithmetic")
"""Names of the task sets."""


def model_path() -> Path:
    """The folder of the model and its tokenizer, as `from_pretrained` takes it."""
    return Path(__file__).parent / "model"


def texts(n: int, seed: int, split: str = "calibration") -> list[str]:
    """Return `n` documents; every pair of split and seed is a random stream of its own.

    No text of any split contains an item of `reasoning` or `arithmetic`. The facts that
    `knowledge` asks about are told in the split `train` alone.
    """
    rng = Random(f"srcr bundled texts {split} {seed}")
    return [document(rng, split == "train") for _ in range(n)]


@cache
def _tasks() -> dict[str, tuple[Item, ...]]:
    makers = (knowledge_items, reasoning_items, arithmetic_items)
    return {name: tuple(make()) for name, make in zip(TASKS, makers, strict=True)}


def tasks() -> dict[str, list[Item]]:
    """The task sets by name; always the same items in the same order."""
    return {name: list(items) for name, items in _tasks().items()}


def chance(name: str) -> float:
    """The expected accuracy of guessing on a task set."""
    items = _tasks()[name]
    return sum(1 / len(item.choices) for item in items) / len(items)
