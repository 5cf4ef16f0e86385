"""What a search is after: a measure to choose by, or a constraint that must hold."""

import re
from dataclasses import dataclass

from srcr.errors import InputError

_CONSTRAINT = re.compile(r"([\w./-]+)\s*(>=|<=)\s*([0-9.eE+-]+)")
#: Measures that are means over several tasks.
MEANS = ("sr", "srcr")
#: Measures of which less is better.
LOWER_IS_BETTER = ("kl",)


@dataclass(frozen=True)
class Objective:
    """``measure`` by which finalists are compared: "kl", "top1", "semantic", "sr", "srcr", or the retention
    of a task by its name; ``tasks_of_sr`` that "sr" and "srcr" take their mean over, at most ``limit`` items
    of each."""

    measure: str = "kl"
    tasks_of_sr: tuple[str, ...] = ("bundled",)
    limit: int | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that have to be run."""
        if self.measure in ("kl", "top1", "semantic"):
            return ()
        return self.tasks_of_sr if self.measure in MEANS else (self.measure,)


@dataclass(frozen=True)
class Constraint:
    """``objective`` must be at least ``bound`` (at most, where lower is better)."""

    objective: Objective
    bound: float

    @property
    def text(self) -> str:
        """The constraint as it is written on the command line."""
        measure = self.objective.measure
        return f"{measure}{'<=' if measure in LOWER_IS_BETTER else '>='}{self.bound:g}"


def parse_constraint(text: str, objective: Objective) -> Constraint:
    """The constraint that ``semantic>=0.98``, ``kl<=0.01`` or ``knowledge>=0.95`` names; tasks and limit are
    those of ``objective``.

    Raises:
        InputError: another form, or the wrong direction.
    """
    match = _CONSTRAINT.fullmatch(text.strip())
    try:
        if match is None:
            raise ValueError
        bound = float(match[3])
    except ValueError:
        raise InputError(
            f"constraint {text!r}: use for example 'semantic>=0.98' or 'kl<=0.01', in quotes"
        ) from None
    sign = "<=" if match[1] in LOWER_IS_BETTER else ">="
    if match[2] != sign:
        raise InputError(f"constraint {text!r}: {match[1]} is better the other way, use {sign}")
    return Constraint(Objective(match[1], objective.tasks_of_sr, objective.limit), bound)
