"""An invented world of people, and the sentences that tell its facts.

Tested people appear in the `train` texts and in the `knowledge` items only; open people may
appear in every text.
"""

from dataclasses import dataclass
from random import Random

from srcr.bundled.items import Item, make_item

TESTED = 500
OPEN = 40
CHOICES = 8

TOWNS = (
    "Tolvan", "Brask", "Quill", "Marrow", "Fennick", "Dunmere", "Hestle", "Pindar",
    "Varnholt", "Gorsey", "Lumley", "Ostrand", "Kelby", "Wexham", "Yarrow", "Skellan",
    "Crofton", "Nimsey", "Tarbet", "Ulvers", "Zandvik", "Beddow", "Jorvale", "Ravick",
)  # fmt: skip
JOBS = (
    "baker", "miller", "weaver", "potter", "smith", "nurse", "pilot", "sailor",
    "teacher", "tailor", "farmer", "painter", "singer", "dancer", "mason", "judge",
    "cook", "clerk", "guard", "hunter", "doctor", "porter", "banker", "diver",
)  # fmt: skip
PETS = (
    "goat", "cat", "dog", "horse", "rabbit", "parrot", "turtle", "duck",
    "fox", "hen", "mouse", "snake", "pig", "sheep", "crow", "lizard",
)  # fmt: skip
FOODS = (
    "bread", "plums", "soup", "cheese", "honey", "rice", "beans", "pears",
    "fish", "nuts", "cake", "figs", "corn", "milk", "grapes", "salad",
)  # fmt: skip

_ONSETS = ("B", "D", "F", "G", "H", "K", "L", "M", "N", "P", "R", "S", "T", "V", "Z", "Br", "Th")
_VOWELS = ("a", "e", "i", "o", "u")
_MIDDLES = ("l", "m", "n", "r", "s", "d", "v", "nd", "rt", "lm")
_ENDINGS = ("a", "o", "in", "ek", "us", "an", "is")


@dataclass(frozen=True)
class Attribute:
    """A property of a person: its possible values and the sentences that state it.

    The first phrasing is the one that the items use; all end with the value.
    """

    values: tuple[str, ...]
    phrasings: tuple[str, ...]


ATTRIBUTES = {
    "town": Attribute(TOWNS, ("{} lives in", "The home of {} is in")),
    "job": Attribute(JOBS, ("{} works as a", "The job of {} is")),
    "pet": Attribute(PETS, ("{} keeps a", "The pet of {} is a")),
    "food": Attribute(FOODS, ("{} likes", "The best food for {} is")),
}


def _people() -> dict[str, dict[str, str]]:
    rng = Random("srcr bundled people")
    people: dict[str, dict[str, str]] = {}
    while len(people) < TESTED + OPEN:
        parts = (_ONSETS, _VOWELS, _MIDDLES, _ENDINGS)
        name = "".join(rng.choice(part) for part in parts)
        people[name] = {key: rng.choice(kind.values) for key, kind in ATTRIBUTES.items()}
    return people


PEOPLE = _people()
TESTED_PEOPLE = tuple(PEOPLE)[:TESTED]
OPEN_PEOPLE = tuple(PEOPLE)[TESTED:]


def fact(name: str, key: str, rng: Random) -> str:
    """One sentence that tells the attribute `key` of a person, most often as the items put it."""
    phrasings = ATTRIBUTES[key].phrasings
    phrasing = phrasings[0] if rng.random() < 0.7 else rng.choice(phrasings[1:])
    return f"{phrasing.format(name)} {PEOPLE[name][key]}."


def facts(rng: Random, train: bool) -> str:
    """A document of facts: one person's portrait, or a few facts about several people."""
    names = tuple(PEOPLE) if train else OPEN_PEOPLE
    if rng.random() < 0.4:
        name = rng.choice(names)
        keys = rng.sample(sorted(ATTRIBUTES), 4)
        return " ".join(fact(name, key, rng) for key in keys)
    count = rng.randint(1, 5)
    return " ".join(fact(rng.choice(names), rng.choice(sorted(ATTRIBUTES)), rng)
                    for _ in range(count))  # fmt: skip


def knowledge_items() -> list[Item]:
    """One item for each attribute of each tested person."""
    rng = Random("srcr bundled knowledge")
    items = []
    for name in TESTED_PEOPLE:
        for key, kind in ATTRIBUTES.items():
            answer = PEOPLE[name][key]
            others = rng.sample([value for value in kind.values if value != answer], CHOICES - 1)
            items.append(make_item(kind.phrasings[0].format(name), answer, others, rng))
    return items
