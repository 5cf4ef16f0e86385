"""Candidates measured in this process."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from srcr.data.tokens import Tokens
from srcr.models.blockwise import copy_on
from srcr.models.checkpoint import OpenModel
from srcr.models.topology import LinearGroup
from srcr.planning.candidates import CandidateModel, Candidates
from srcr.planning.database.store import CachedWeights, LevelDatabase
from srcr.planning.space import Assignment
from srcr.planning.specs import MeasurementSpec
from srcr.records.search import Measurement


@dataclass(frozen=True, eq=False)
class EvaluatorInputs:
    """What measuring takes besides the base: the level database (its folder and context), the groups of
    linears that get a level, the search text, a
    device, and how it is done."""

    database: Path
    context: str
    groups: tuple[LinearGroup, ...]
    tokens: Tokens
    device: str
    spec: MeasurementSpec = field(default_factory=MeasurementSpec)

    def candidates(self, opened: OpenModel) -> Candidates:
        """The candidates around a base, which is held in float32 and shared with them."""
        base = opened.loaded(torch.float32)
        weights = CachedWeights(LevelDatabase(self.database, self.context), self.spec.cache_bytes)
        model = CandidateModel(copy_on(base, self.device), opened.topology, self.groups, weights)
        n, longest = self.tokens.input_ids.shape
        size = -(-n // self.spec.batches)
        batches = [batch.input_ids for batch in self.tokens.batches(size * longest)]
        return Candidates(model, batches, self.spec)


class LocalEvaluator:
    """An :class:`~srcr.planning.evaluators.Evaluator` that measures in this process, one after the other."""

    parallel = 1

    def __init__(self, candidates: Candidates) -> None:
        self._candidates = candidates
        self._pace: list[float] = []

    def center_on(self, assignment: Assignment) -> None:
        """Take the incumbent."""
        self._candidates.center_on(assignment)
        # A group alone has nothing to keep pace with.
        self._pace = [] if None in assignment else self._candidates.pace(assignment)

    def measure(self, assignments: Sequence[Assignment]) -> Iterator[Measurement]:
        """The assignments' measurements, in their order."""
        for assignment in assignments:
            yield self._candidates.measure(assignment, self._pace)
