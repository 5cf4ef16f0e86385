"""Whole structures that go before anything else is done to a model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, get_args

from srcr.errors import InputError
from srcr.serialize import STRICT

Structure = Literal["channels", "heads", "layers", "experts"]
STRUCTURES: tuple[Structure, ...] = get_args(Structure)
#: What people call several elements of each.
NAMES: Mapping[str, str] = {
    "channels": "feed-forward channels",
    "heads": "key-value heads",
    "layers": "layers",
    "experts": "experts",
}
#: Hidden units of a feed-forward network come and go by so many: kernels work on whole tiles.
CHANNEL_MULTIPLE = 32


@dataclass(frozen=True)
class StructureSpec:
    """What is removed whole: feed-forward ``channels`` and key-value ``heads`` (each with the query heads
    that share it) of every layer, whole ``layers``, and ``experts`` of every layer that has some. A share
    (above 0, below 1), or a count (from 1 on); None: nothing.

    >>> StructureSpec(channels=0.25, layers=2).count("layers", 12)
    2
    """

    __pydantic_config__ = STRICT

    channels: int | float | None = None
    heads: int | float | None = None
    layers: int | float | None = None
    experts: int | float | None = None

    def __post_init__(self) -> None:
        for kind, amount in self.amounts().items():
            share = isinstance(amount, float) and 0 < amount < 1
            count = isinstance(amount, int) and amount >= 1
            if not (share or count):
                raise InputError(
                    f"remove {kind}={amount:g}: use a share above 0 and below 1 (0.25 for a quarter), or a "
                    "count from 1 on"
                )

    def amounts(self) -> dict[Structure, float]:
        """The share or count of each structure of which something goes."""
        values = {kind: getattr(self, kind) for kind in STRUCTURES}
        return {kind: value for kind, value in values.items() if value is not None}

    def count(self, kind: Structure, size: int, multiple: int = 1) -> int:
        """How many of ``size`` go: a count as it is; of a share as many as come nearest to it and leave a
        multiple of ``multiple``.

        Raises:
            InputError: none would go, or none would be left; it names the nearest that work.
        """
        amount = self.amounts().get(kind)
        if amount is None:
            return 0
        left = size - int(amount)
        if amount < 1:
            left = multiple * math.floor(size * (1 - amount) / multiple + 0.5)
        if not 0 < left < size:
            most = (size - 1) // multiple
            remedy = f"leave {most * multiple} or fewer" if most else "leave it out"
            raise InputError(
                f"remove {kind}={amount:g} takes {size - left} of {size} {kind}"
                f"{f' (in multiples of {multiple})' if multiple > 1 else ''}, and at least one must go and "
                f"one stay: {remedy}"
            )
        return size - left


def parse_structures(text: str) -> StructureSpec:
    """The spec in a text such as "channels=0.25,heads=0.34,layers=2".

    Raises:
        InputError: it is none.
    """
    amounts: dict[str, float] = {}
    for part in text.split(","):
        kind, _, amount = (piece.strip() for piece in part.partition("="))
        if kind not in STRUCTURES:
            raise InputError(
                f"remove {part.strip()!r}: use {', '.join(STRUCTURES)} with a share or a count, as "
                "channels=0.25,heads=0.34,layers=2"
            )
        if kind in amounts:
            raise InputError(f"remove names {kind} twice")
        try:
            amounts[kind] = float(amount) if "." in amount or "e" in amount else int(amount)
        except ValueError:
            raise InputError(
                f"remove {part.strip()!r}: {amount!r} is neither a share nor a count"
            ) from None
    return StructureSpec(**amounts)


def structure_spec(given: str | Mapping[str, float] | None) -> StructureSpec | None:
    """The spec that an option holds: a text, or a mapping of a YAML file.

    Raises:
        InputError: it is none.
    """
    if given is None:
        return None
    if isinstance(given, str):
        return parse_structures(given)
    unknown = [key for key in given if key not in [field.name for field in fields(StructureSpec)]]
    if unknown:
        raise InputError(f"remove {unknown[0]!r}: use {', '.join(STRUCTURES)}")
    return StructureSpec(**given)
