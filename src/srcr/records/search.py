"""What a search measured and chose, ``search.json``."""

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import AliasChoices, Field

from srcr.plans.objective import Constraint, Objective
from srcr.plans.plan import Target
from srcr.records.evaluation import Evaluation, KlEstimate
from srcr.records.sensitivity import SensitivityTable


@dataclass(frozen=True)
class Measurement:
    """A candidate: the level of each group (None: left as it is), and its KL on the search text; not
    ``complete`` where it was given up before the end. ``number``: which one it was, from 1 (None: another
    process measured it, and this one did not need it)."""

    kl: float
    #: Called "whole" in files of earlier versions.
    complete: Annotated[bool, Field(validation_alias=AliasChoices("complete", "whole"))]
    levels: tuple[str | None, ...]
    number: int | None = None


@dataclass(frozen=True)
class ChoiceScore:
    """A finalist on the choice text: its KL, and the objective's ``value``."""

    kl: KlEstimate
    value: float | None


@dataclass(frozen=True)
class SearchSummary:
    """What is read of a ``search.json`` that another version of srcr may have written."""

    chosen: str = ""
    finalists: tuple[Evaluation, ...] = ()
    sensitivity: SensitivityTable | None = None
    measured: tuple[Measurement, ...] = ()


@dataclass(frozen=True)
class SearchResult:
    """``chosen``: the finalist that became the output; ``choice``: every finalist on the text that it was
    chosen on; ``finalists``: every finalist, by name and plan, on text that nothing before has seen.
    ``fingerprint``: a hash of everything that decides the search, which ``settings`` name: a value, or the
    hash of one."""

    model: str
    target: Target | Constraint
    command: str
    trials: int
    seconds: float
    #: Called "units" in files of earlier versions.
    groups: Annotated[
        tuple[tuple[str, ...], ...], Field(validation_alias=AliasChoices("groups", "units"))
    ]
    sensitivity: SensitivityTable
    measured: tuple[Measurement, ...]
    chosen: str
    objective: Objective
    choice: dict[str, ChoiceScore]
    finalists: tuple[Evaluation, ...]
    fingerprint: str = ""
    settings: dict[str, str] = field(default_factory=dict)
