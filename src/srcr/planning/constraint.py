"""What a search is after: an objective to choose by, or a constraint that must hold."""

import re
from dataclasses import dataclass
from typing import Any

from srcr.errors import InputError
from srcr.evaluation import TaskSpec
from srcr.metrics.semantic import SemanticSpec

_CONSTRAINT = re.compile(r"([\w./-]+)\s*(>=|<=)\s*([0-9.eE+-]+)")
#: Measures of every evaluation, and where lower is better.
LOWER = ("kl",)


@dataclass(frozen=True)
class Objective:
    """``measure`` by which finalists are compared: "kl", "top1", "semantic", "sr", "srcr", or the retention
    of a task by its name; ``tasks_of_sr`` that "sr" and "srcr" take their mean over, at most ``limit`` items
    of each."""

    measure: str = "kl"
    tasks_of_sr: tuple[str, ...] = ("bundled",)
    limit: int | None = None

    @property
    def tasks(self) -> TaskSpec | None:
        """What has to be run."""
        if self.measure in ("kl", "top1", "semantic"):
            return None
        names = self.tasks_of_sr if self.measure in ("sr", "srcr") else (self.measure,)
        return TaskSpec(names, self.limit)

    @property
    def semantic(self) -> SemanticSpec | None:
        """What has to be written and compared."""
        return SemanticSpec() if self.measure == "semantic" else None

    def value(self, found: dict[str, Any]) -> float | None:
        """The measure in an evaluation; None where it is undefined."""
        if self.measure == "kl":
            return float(found["divergence"]["kl"]["value"])
        if self.measure == "top1":
            return float(found["divergence"]["top1_agreement"]["value"])
        if self.measure == "semantic":
            return float(found["semantic"]["consistency"])
        if self.measure in ("sr", "srcr"):
            value = found[self.measure]
        else:
            tasks = found["tasks"]
            value = next(iter(tasks.values()))["retention"] if len(tasks) == 1 else found["sr"]
        return None if value is None else float(value)

    def score(self, found: dict[str, Any]) -> float:
        """The measure so that lower is better.

        Raises:
            InputError: it is undefined for this model (the base is at chance).
        """
        value = self.value(found)
        if value is None:
            raise InputError(
                f"objective {self.measure!r} is undefined here: the base model is at chance; use kl"
            )
        return value if self.measure in LOWER else -value


@dataclass(frozen=True)
class Constraint:
    """``objective`` must be at least ``bound`` (at most, where lower is better)."""

    objective: Objective
    bound: float

    @property
    def text(self) -> str:
        """As it is written."""
        return f"{self.objective.measure}{'<=' if self.objective.measure in LOWER else '>='}{self.bound:g}"

    def holds(self, found: dict[str, Any]) -> bool:
        """Whether an evaluation meets it."""
        limit = self.bound if self.objective.measure in LOWER else -self.bound
        return self.objective.score(found) <= limit


def parse_constraint(text: str, objective: Objective) -> Constraint:
    """``semantic>=0.98``, ``kl<=0.01``, ``knowledge>=0.95``; tasks and limit are the objective's.

    Raises:
        InputError: another form, or the wrong direction.
    """
    found = _CONSTRAINT.fullmatch(text.strip())
    try:
        if found is None:
            raise ValueError
        bound = float(found[3])
    except ValueError:
        raise InputError(
            f"constraint {text!r}: use for example semantic>=0.98 or kl<=0.01"
        ) from None
    wanted = "<=" if found[1] in LOWER else ">="
    if found[2] != wanted:
        raise InputError(f"constraint {text!r}: {found[1]} is better the other way, use {wanted}")
    return Constraint(Objective(found[1], objective.tasks_of_sr, objective.limit), bound)
