"""Who measures candidates: this process, or the workers of a Ray cluster."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from srcr.planning.space import Assignment
from srcr.records.search import Measurement


class Evaluator(Protocol):
    """Measures candidates, ``parallel`` of them at the same time."""

    @property
    def parallel(self) -> int:
        """How many are measured at the same time."""
        ...

    def center_on(self, assignment: Assignment) -> None:
        """Take the incumbent, around which the next ones will be."""
        ...

    def measure(self, assignments: Sequence[Assignment]) -> Iterator[Measurement]:
        """The assignments' measurements, in their order."""
        ...
