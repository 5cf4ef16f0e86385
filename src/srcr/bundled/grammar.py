"""Documents of the bundled model's language: stories, facts, sums and puzzles."""

from collections.abc import Callable
from random import Random

from srcr.bundled.facts import FOODS, OPEN_PEOPLE, PETS, TOWNS, facts
from srcr.bundled.puzzles import (
    NAMES,
    THINGS,
    addition,
    boolean,
    holder,
    order,
    solved,
    subtraction,
)

_TIMES = ("One day", "Last night", "In the spring", "Early one morning", "After the rain", "Today")
_PLACES = ("river", "market", "hill", "forest", "bridge", "garden", "old mill", "harbour")
_MOODS = ("happy", "tired", "proud", "sad", "calm", "angry", "curious", "afraid")
_KINDS = ("small", "red", "old", "heavy", "shiny", "broken", "blue", "strange")
_SKIES = ("The sun was warm", "It began to snow", "The wind was cold", "The sky was grey")
_OPENINGS = (
    "{time} {a} walked to the {place}.",
    "{time}, near {town}, {a} met {b}.",
    "{a} and {b} went to the {place} with a {pet}.",
    "{sky} when {a} came to {town}.",
    "There was once a {kind} {thing} at the {place}. {time} {a} found it.",
)
_MIDDLES = (
    "{a} looked for the {kind} {thing} but saw only a {pet}.",
    "{b} asked for some {food}, and {a} said yes.",
    '"Is this your {thing}?" asked {b}. "No, my {thing} is {kind}," said {a}.',
    "They sat by the {place} and ate {food} and {food2}.",
    "The {pet} ran away with the {food}.",
    "{a} told {b} a long story about {town}.",
    "{sky}, so they stayed at the {place}.",
    "{a} sold the {thing} and got a {kind} {pet} for it.",
    "{c} heard this and was {mood}.",
    "Then {c} came from {town} with a {kind} {thing}.",
)
_ENDINGS = (
    "In the end {a} was {mood}, and {b} was {mood2}.",
    "{b} went home to {town} and never saw the {pet} again.",
    "So {a} kept the {thing}, and everyone was {mood}.",
    "{a} thanked {b} and slept well that night.",
)


def story(rng: Random) -> str:
    """A short story in which almost every word of content is a random choice."""
    a, b, c = rng.sample(NAMES + OPEN_PEOPLE, 3)
    thing, pet, kind = rng.choice(THINGS), rng.choice(PETS), rng.choice(_KINDS)
    parts = [rng.choice(_OPENINGS), *rng.sample(_MIDDLES, rng.randint(1, 4)), rng.choice(_ENDINGS)]
    return " ".join(
        part.format(
            a=a, b=b, c=c, thing=thing, pet=pet, kind=kind,
            time=rng.choice(_TIMES), place=rng.choice(_PLACES), town=rng.choice(TOWNS),
            sky=rng.choice(_SKIES), mood=rng.choice(_MOODS), mood2=rng.choice(_MOODS),
            food=rng.choice(FOODS), food2=rng.choice(FOODS),
        )
        for part in parts
    )  # fmt: skip


LANGUAGE: dict[Callable[[Random, bool], str], float] = {
    lambda rng, train: story(rng): 0.06,
    lambda rng, train: facts(rng, train): 0.36,
    lambda rng, train: solved(addition, rng, 6): 0.15,
    lambda rng, train: solved(subtraction, rng, 6): 0.15,
    lambda rng, train: solved(boolean, rng, 4): 0.14,
    lambda rng, train: solved(holder, rng, 2): 0.06,
    lambda rng, train: solved(order, rng, 2): 0.08,
}
"""Kinds of documents and their frequency."""


def document(rng: Random, train: bool) -> str:
    """One document; only with `train` may it tell the facts that the tasks ask about."""
    make = rng.choices(tuple(LANGUAGE), tuple(LANGUAGE.values()))[0]
    return make(rng, train)
