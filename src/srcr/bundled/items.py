"""The multiple-choice item and the rule that keeps task items out of all texts."""

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from zlib import crc32


@dataclass(frozen=True)
class Item:
    """A multiple-choice question: `prompt + choices[answer]` is the true text."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


def make_item(prompt: str, answer: str, others: Iterable[str], rng: Random) -> Item:
    """Build an item whose choices, in random order, continue the prompt as ` word.`."""
    words = [answer, *others]
    rng.shuffle(words)
    return Item(prompt, tuple(f" {word}." for word in words), words.index(answer))


def held_out(key: str, every: int) -> bool:
    """Whether the instance named `key` is reserved for the tasks (about 1 in `every`)."""
    return crc32(key.encode()) % every == 0
