"""The grammar and the task sets: seeded, disjoint, and right."""

import ast
import re
from collections.abc import Iterator
from itertools import permutations

import pytest

from srcr.bundled import TASKS, Item, chance, tasks, texts
from srcr.bundled.facts import ATTRIBUTES, OPEN_PEOPLE, PEOPLE, TESTED_PEOPLE

SPLITS = ("train", "calibration", "evaluation")


def solve_sum(prompt: str) -> str:
    a, b = map(int, re.fullmatch(r"(\d+) \+ (\d+) =", prompt).groups())
    return str(len([*range(a), *range(b)]))


def solve_difference(prompt: str) -> str:
    a, b = map(int, re.fullmatch(r"(\d+) - (\d+) =", prompt).groups())
    return str(len(range(b, a)))


def solve_boolean(prompt: str) -> str:
    tree = ast.parse(prompt.removesuffix(" is").replace("true", "True").replace("false", "False"))

    def value(node: ast.expr) -> bool:
        match node:
            case ast.Constant(value=bool(known)):
                return known
            case ast.UnaryOp(op=ast.Not(), operand=inner):
                return not value(inner)
            case ast.BoolOp(op=ast.And(), values=parts):
                return all(value(part) for part in parts)
            case ast.BoolOp(op=ast.Or(), values=parts):
                return any(value(part) for part in parts)
        raise AssertionError(ast.dump(node))

    return str(value(tree.body[0].value)).lower()


def solve_holder(prompt: str) -> str:
    start = re.match(r"(\w+) has the (\w+)\.", prompt)
    holder, thing = start[1], start[2]
    for giver, given, taker in re.findall(r"(\w+) gives the (\w+) to (\w+)\.", prompt):
        assert (giver, given) == (holder, thing)
        holder = taker
    assert prompt.endswith(f" Who has the {thing} now?")
    return holder


RELATIONS = {"taller": 1, "older": 1, "shorter": -1, "younger": -1}
EXTREMES = {"tallest": 0, "oldest": 0, "shortest": -1, "youngest": -1}


def solve_order(prompt: str) -> str:
    above = [
        (first, second) if RELATIONS[more] > 0 else (second, first)
        for first, more, second in re.findall(r"(\w+) is (\w+) than (\w+)\.", prompt)
    ]
    names = sorted({name for claim in above for name in claim})
    (line,) = (
        line
        for line in permutations(names)
        if all(line.index(first) < line.index(second) for first, second in above)
    )
    second, place = re.search(r"Who is (second )?(\w+)\?$", prompt).groups()
    return line[EXTREMES[place] + bool(second)]


def solver(prompt: str):
    if prompt.endswith("="):
        return solve_difference if "-" in prompt else solve_sum
    if prompt.endswith(" is"):
        return solve_boolean
    return solve_holder if "Who has" in prompt else solve_order


def right(item: Item) -> str:
    return item.choices[item.answer].strip(" .")


CLAIM = re.compile(
    r"\w+ (has the \w+|gives the \w+ to \w+|is (taller|shorter|older|younger) than \w+)\."
)


def solved(document: str) -> Iterator[tuple[str, str]]:
    """Every prompt and answer of the puzzles in a document."""
    claims: list[str] = []
    question, answered = "", True
    for sentence in (part.strip() for part in re.findall(r"[^.?]+[.?]", document)):
        if question:
            yield " ".join([*claims, question]), sentence.removesuffix(".")
            question, answered = "", True
        elif CLAIM.fullmatch(sentence):
            claims = [sentence] if answered else [*claims, sentence]
            answered = False
        elif sentence.startswith("Who ") and sentence.endswith("?"):
            question = sentence
        elif stated := re.fullmatch(r"(\d+ [+-] \d+ =|[a-z() ]* is) (\w+)\.", sentence):
            yield stated[1], stated[2]
        else:
            claims, answered = [], True


@pytest.fixture(scope="module")
def documents() -> dict[str, list[str]]:
    return {split: texts(4000, seed=5, split=split) for split in SPLITS}


def test_texts_are_a_function_of_split_and_seed(documents):
    assert texts(20, seed=1) == texts(20, seed=1) == texts(30, seed=1)[:20]
    assert texts(20, seed=1) != texts(20, seed=2)
    for split, written in documents.items():
        assert texts(10, seed=5, split=split) == written[:10]
        assert all(text.isascii() and text.endswith(".") for text in written)
    assert len({tuple(written) for written in documents.values()}) == len(SPLITS)


def test_texts_vary(documents):
    worded = [text for text in documents["calibration"] if not text[0].isdigit()]
    assert len(set(worded)) > 0.6 * len(worded)


def test_counts_and_chance():
    assert tuple(tasks()) == TASKS
    assert tasks() == tasks()
    for items in tasks().values():
        assert len(items) >= 500
        assert len({item.prompt for item in items}) == len(items)
        for item in items:
            assert len(set(item.choices)) == len(item.choices) in (2, 4, 8)
            assert 0 <= item.answer < len(item.choices)
            assert not item.prompt.endswith(" ")
            assert all(re.fullmatch(r" \w+\.", choice) for choice in item.choices)
    assert chance("knowledge") == chance("arithmetic") == 1 / 8
    assert chance("reasoning") == pytest.approx((300 / 2 + 600 / 4) / 900)


@pytest.mark.parametrize("name", TASKS)
def test_place_of_the_answer_tells_nothing(name):
    items = tasks()[name]
    for place in range(max(len(item.choices) for item in items)):
        able = sum(1 / len(item.choices) for item in items if place < len(item.choices))
        assert sum(item.answer == place for item in items) < 1.3 * able


@pytest.mark.parametrize("name", ["reasoning", "arithmetic"])
def test_answers_are_right(name):
    for item in tasks()[name]:
        assert solver(item.prompt)(item.prompt) == right(item)


def test_knowledge_answers_are_the_facts():
    world = {
        kind.phrasings[0].format(name): PEOPLE[name][key]
        for name in TESTED_PEOPLE
        for key, kind in ATTRIBUTES.items()
    }
    for item in tasks()["knowledge"]:
        assert world[item.prompt] == right(item)


@pytest.mark.parametrize("split", SPLITS)
def test_texts_hold_no_puzzle_of_the_tasks_and_no_wrong_answer(documents, split):
    asked = {item.prompt for name in ("reasoning", "arithmetic") for item in tasks()[name]}
    seen = [pair for text in documents[split] for pair in solved(text)]
    assert len(seen) > 4000
    assert {solver(prompt).__name__ for prompt, _ in seen} == {
        "solve_sum", "solve_difference", "solve_boolean", "solve_holder", "solve_order",
    }  # fmt: skip
    for prompt, answer in seen:
        assert prompt not in asked, prompt
        assert solver(prompt)(prompt) == answer


def test_every_prompt_is_found_by_the_search_for_puzzles():
    for name in ("reasoning", "arithmetic"):
        for item in tasks()[name]:
            assert list(solved(f"{item.prompt} {right(item)}.")) == [(item.prompt, right(item))]


def test_what_undoes_a_held_out_sum_is_held_out_too():
    taught = {
        prompt
        for prompt, _ in solved(" ".join(texts(20_000, seed=7, split="train")))
        if "=" in prompt
    }
    assert len(taught) > 5000
    for item in tasks()["arithmetic"]:
        first, second = map(int, re.findall(r"\d+", item.prompt))
        a, b = (first, second) if "+" in item.prompt else (second, first - second)
        forms = {f"{a} + {b} =", f"{b} + {a} =", f"{a + b} - {a} =", f"{a + b} - {b} ="}
        assert not forms & taught


def test_tested_people_are_told_of_in_training_alone(documents):
    assert not set(TESTED_PEOPLE) & set(OPEN_PEOPLE)
    told = {split: set(re.findall(r"\w+", " ".join(text))) for split, text in documents.items()}
    assert len(set(TESTED_PEOPLE) & told["train"]) > 0.9 * len(TESTED_PEOPLE)
    assert not set(TESTED_PEOPLE) & told["calibration"]
    assert not set(TESTED_PEOPLE) & told["evaluation"]


@pytest.mark.slow
def test_every_fact_is_told_in_training():
    told = set(re.findall(r"[^.]+\.", ". ".join(texts(80_000, seed=0, split="train"))))
    told = {sentence.strip() for sentence in told}
    for item in tasks()["knowledge"]:
        assert item.prompt + item.choices[item.answer] in told
