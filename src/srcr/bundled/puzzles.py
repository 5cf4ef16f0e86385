"""Sums and little puzzles. Instances that `held_out` picks are for the tasks alone.

Each kind is a function that draws an instance, with `train=True` from those for texts and with
`train=False` from the held-out ones.
"""

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from random import Random
from typing import NamedTuple

from srcr.bundled.items import Item, held_out, make_item

LARGEST_SUM = 99
NAMES = ("Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Ida", "Jon", "Kim", "Leo", "Una")
THINGS = ("ball", "key", "cup", "book", "coin", "lamp", "drum", "kite")
RELATIONS = (("taller", "tallest", "shortest"), ("older", "oldest", "youngest"))


class Question(NamedTuple):
    """A question, which continues the puzzle's text, its answer, and the wrong choices."""

    text: str
    answer: str
    others: tuple[str, ...]


class Puzzle(NamedTuple):
    """A text that sets out an instance, and one or two questions about it."""

    text: str
    questions: tuple[Question, ...]


@cache
def _pairs(train: bool, largest_sum: int = LARGEST_SUM) -> tuple[tuple[int, int], ...]:
    """Operands of the sums; `a + b` and `b + a` are always on the same side."""
    return tuple(
        (a, b)
        for a in range(largest_sum + 1)
        for b in range(largest_sum + 1 - a)
        if held_out(f"{min(a, b)}+{max(a, b)}", 6) != train
    )


def addition(rng: Random, train: bool) -> Puzzle:
    """A sum; texts favour the small ones, which the larger ones are made of."""
    a, b = _operands(rng, train)
    return Puzzle("", (Question(f"{a} + {b} =", str(a + b), _near(a + b, rng)),))


def subtraction(rng: Random, train: bool) -> Puzzle:
    """A difference; held out where the sum that it undoes is."""
    a, b = _operands(rng, train)
    return Puzzle("", (Question(f"{a + b} - {a} =", str(b), _near(b, rng)),))


def _operands(rng: Random, train: bool) -> tuple[int, int]:
    small = train and rng.random() < 0.2
    return rng.choice(_pairs(train, 18 if small else LARGEST_SUM))


def _near(number: int, rng: Random) -> tuple[str, ...]:
    """Seven wrong answers: one or ten off, as a lost carry leaves it, or nearly so."""
    steps = (1, 10, 2, 11, 9, 20, 3, 12, 8)
    near = [n for d in steps for n in (number - d, number + d) if 0 <= n <= LARGEST_SUM]
    return tuple(str(n) for n in rng.sample(near[:9], 7))


def _leaf(rng: Random) -> tuple[str, bool]:
    value, negated = rng.random() < 0.5, rng.random() < 0.3
    return f"{'not ' if negated else ''}{'true' if value else 'false'}", value != negated


def _join(left: tuple[str, bool], right: tuple[str, bool], rng: Random) -> tuple[str, bool]:
    if rng.random() < 0.5:
        return f"{left[0]} and {right[0]}", left[1] and right[1]
    return f"{left[0]} or {right[0]}", left[1] or right[1]


def boolean(rng: Random, train: bool) -> Puzzle:
    """A boolean expression of two leaves (texts only), or of three or four with brackets."""
    while True:
        text, value = _join(_leaf(rng), _leaf(rng), rng)
        if not train or rng.random() < 0.75:
            pair = (f"({text})", value)
            if rng.random() < 0.4:
                text, value = _join(_leaf(rng), _leaf(rng), rng)
                other = (f"({text})", value)
            else:
                other = _leaf(rng)
            order = (pair, other) if rng.random() < 0.5 else (other, pair)
            text, value = _join(*order, rng)
            if held_out(text, 4) == train:
                continue
        answer, wrong = ("true", "false") if value else ("false", "true")
        return Puzzle("", (Question(f"{text} is", answer, (wrong,)),))


def holder(rng: Random, train: bool) -> Puzzle:
    """A thing is handed on one to three times; who has it now?"""
    while True:
        names = rng.sample(NAMES, 4)
        thing = rng.choice(THINGS)
        hands = names[: rng.randint(2, 4)]
        moves = [f"{a} gives the {thing} to {b}." for a, b in pairwise(hands)]
        text = " ".join([f"{hands[0]} has the {thing}.", *moves])
        if held_out(text, 8) != train:
            return Puzzle(f"{text} ", (_who(f"Who has the {thing} now?", hands[-1], names),))


def order(rng: Random, train: bool) -> Puzzle:
    """Four people compared pairwise; who is first, second, and last?"""
    while True:
        names = rng.sample(NAMES, 4)
        more, most, least = rng.choice(RELATIONS)
        text = " ".join(f"{a} is {more} than {b}." for a, b in pairwise(names))
        if held_out(text, 8) != train:
            return Puzzle(
                f"{text} ",
                (
                    _who(f"Who is {most}?", names[0], names),
                    _who(f"Who is second {most}?", names[1], names),
                    _who(f"Who is {least}?", names[3], names),
                ),
            )


def _who(text: str, answer: str, names: list[str]) -> Question:
    return Question(text, answer, tuple(name for name in names if name != answer))


Kind = Callable[[Random, bool], Puzzle]


def solved(kind: Kind, rng: Random, most: int) -> str:
    """A document of one to `most` puzzles of one kind with the answers to all questions."""
    parts = []
    for _ in range(rng.randint(1, most)):
        text, questions = kind(rng, True)
        asked = rng.sample(questions, len(questions))
        parts.append(text + " ".join(f"{question.text} {question.answer}." for question in asked))
    return " ".join(parts)


def _items(kind: Kind, count: int) -> list[Item]:
    """Questions about the first `count` different held-out instances of a kind."""
    rng = Random(f"srcr bundled {kind.__name__}")
    items: dict[str, Item] = {}
    while len(items) < count:
        text, questions = kind(rng, False)
        question = rng.choice(questions)
        prompt = text + question.text
        if prompt not in items:
            items[prompt] = make_item(prompt, question.answer, question.others, rng)
    return list(items.values())


def reasoning_items() -> list[Item]:
    """Held-out puzzles of the three kinds."""
    return _items(boolean, 300) + _items(holder, 300) + _items(order, 300)


def arithmetic_items() -> list[Item]:
    """Held-out sums and differences."""
    return _items(addition, 800) + _items(subtraction, 800)
