"""Disjoint parts of one source: to calibrate, to search, to choose by, and to measure on.

No two parts share a sequence, whatever the source holds: what repeats is dropped. Prompts are pieces of a
part's own sequences, and items of tasks are split in two halves.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, islice, zip_longest
from random import Random
from typing import Literal, TypeVar

from srcr.data.packing import cut_rows
from srcr.data.tokens import Tokens
from srcr.errors import InputError

#: Sequences to search on at least, to choose by, and to measure on.
SEARCH, CHOICE, TEST = 12, 64, 64
#: Parameters below which a model is searched on more sequences, up to twice as many: they cost little there.
SMALL_MODEL = 2_000_000
#: Where a source has too few sequences: this share of them calibrates, the other parts share the rest.
CALIBRATION_SHARE = 0.4
#: Fewer sequences than this make no interval.
FEWEST = 2

Key = TypeVar("Key", bound=Hashable)
#: The half of a task's items that a search chooses by, or that it is measured on.
ItemPart = Literal["choice", "test"]


@dataclass(frozen=True)
class Splits:
    """The four parts, in the order of the source."""

    calibration: Tokens
    search: Tokens
    choice: Tokens
    test: Tokens

    def parts(self) -> tuple[Tokens, ...]:
        """All four."""
        return self.calibration, self.search, self.choice, self.test


def search_sequences(parameters: int) -> int:
    """On how many sequences the candidates of a model of this size are measured."""
    return max(SEARCH, min(2 * SEARCH, SEARCH * SMALL_MODEL // parameters))


def split_tokens(tokens: Tokens, calibration: int, search: int) -> Splits:
    """The parts of ``tokens``: so many sequences to calibrate and to search on, :data:`CHOICE` and
    :data:`TEST` behind them; of a shorter source a share each. A sequence that came before is dropped from
    the later parts.

    Raises:
        InputError: there are too few different sequences.
    """
    keys = tokens.row_keys()
    sizes = [search, CHOICE, TEST]
    if len(keys) < calibration + sum(sizes):
        calibration = min(calibration, int(CALIBRATION_SHARE * len(keys)))
    rest = [calibration + i for i in _new_keys(keys[calibration:], keys[:calibration])]
    if len(rest) < sum(sizes):
        sizes = [len(rest) // 3] * 3
    if calibration < 1 or min(sizes) < FEWEST:
        raise InputError(
            f"{tokens.source} has {len(keys)} sequences, {calibration + len(rest)} of them different: a "
            "search calibrates, searches, chooses and measures on different ones, and needs at least 9"
        )
    remaining = iter(rest)
    parts = [range(calibration), *(list(islice(remaining, size)) for size in sizes)]
    splits = Splits(*(tokens.select(rows) for rows in parts))
    check_disjoint(splits.parts())
    return splits


def _new_keys(keys: Sequence[Key], before: Iterable[Key]) -> list[int]:
    """The numbers of the ``keys`` that are neither in ``before`` nor among the keys above them."""
    seen = set(before)
    numbers = []
    for number, key in enumerate(keys):
        if key not in seen:
            numbers.append(number)
            seen.add(key)
    return numbers


def check_disjoint(parts: Sequence[Tokens]) -> None:
    """Refuse parts that share a sequence.

    Raises:
        InputError: names the sources.
    """
    for left, right in combinations(parts, 2):
        if not set(left.row_hashes()).isdisjoint(right.row_hashes()):
            raise InputError(
                f"two texts share sequences ({left.source}, {right.source}): what is chosen by one and "
                "measured on the other would be known before"
            )


def prompts_of(tokens: Tokens, n: int, length: int, excluded: Tokens | None = None) -> Tokens:
    """At most ``n`` different prompts of ``length`` tokens, pieces of the sequences of ``tokens`` that begin
    with their prefix, and none of them among the ``excluded``: first the beginnings of all sequences, then
    what follows them.

    Raises:
        InputError: the sequences are shorter than a prompt, or there are fewer than two such prompts.
    """
    available = tokens.input_ids.shape[1]
    if available < length:
        raise InputError(
            f"prompts of {length} tokens do not fit into sequences of {available}: use a longer --seq-len"
        )
    rows = [cut_rows(row.tolist(), tokens.prefix, length) for row in tokens.rows()]
    pieces = [
        tuple(piece)
        for following in zip_longest(*rows, fillvalue=())
        for piece in following
        if len(piece) == length
    ]
    before = [] if excluded is None else [tuple(row) for row in excluded.input_ids.tolist()]
    prompts = [pieces[number] for number in _new_keys(pieces, before)[:n]]
    if len(prompts) < FEWEST:
        raise InputError(
            f"{tokens.source} gives fewer than {FEWEST} different prompts of {length} tokens: use more or "
            "longer samples"
        )
    return Tokens.of(prompts, tokens.source, prefix=tokens.prefix)


def item_indices(count: int, part: ItemPart | None, seed: int, name: str) -> list[int]:
    """The items, of ``count``, of a part of a task, in rising order; all of them where ``part`` is None.

    Raises:
        InputError: the task has too few items to split.
    """
    if part is None:
        return list(range(count))
    if count < 2 * FEWEST:
        raise InputError(
            f"task {name!r} has {count} items: a search chooses by one half of them and measures on the "
            f"other, and needs at least {2 * FEWEST}"
        )
    order = list(range(count))
    Random(f"srcr halves {name} {seed}").shuffle(order)
    half = count // 2
    return sorted(order[:half] if part == "choice" else order[half:])
