"""Candidates are proposed from what was measured so far, and measured."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from srcr.planning.allocate import Floats, Option, allocate
from srcr.planning.evaluators import Evaluator
from srcr.planning.space import Assignment, spread_levels
from srcr.planning.specs import ExplorationSpec
from srcr.planning.surrogate import Numbers, Surrogate
from srcr.planning.trials import Trials
from srcr.plans.specs import CompressionLevel
from srcr.records.search import Measurement

#: Told how many candidates were measured, and what the best of them is.
OnMeasured = Callable[[int, str], None]


@dataclass(frozen=True, eq=False)
class CostTable:
    """What each group costs at each level, and the ``limit`` of what all may cost together."""

    options: list[list[Option]]
    limit: int


@dataclass(frozen=True, eq=False)
class SearchDomain:
    """Where a search goes: the ``levels``, and the output ``errors`` [levels] of each group at each of them;
    at ``most`` so many candidates are measured; which ones follows from ``seed`` and results alone."""

    levels: tuple[CompressionLevel, ...]
    errors: tuple[Floats, ...]
    seed: int
    most: int
    spec: ExplorationSpec

    @property
    def size(self) -> int:
        """How many groups of linears there are."""
        return len(self.errors)

    def uniform(self, level: CompressionLevel) -> Assignment:
        """The same level everywhere."""
        return (level,) * self.size

    def probes(self) -> list[Assignment]:
        """Every group alone at a few levels."""
        dense: Assignment = (None,) * self.size
        affordable = max(1, min(self.spec.probes, self.most // 2 // self.size))
        levels = spread_levels(self.levels, affordable)
        return [(*dense[:i], level, *dense[i + 1 :]) for i in range(self.size) for level in levels]


@dataclass(frozen=True, eq=False)
class Observations:
    """What is known of a ``domain``: what was ``measured``, in that order."""

    domain: SearchDomain
    measured: Mapping[Assignment, Measurement]

    def losses(self, rng: np.random.Generator | None = None) -> list[Floats]:
        """The loss [levels] of each group: the mean, or with ``rng`` a draw."""
        spec = self.domain.spec
        best = min((result.kl for _, result in self.complete()), default=float("inf"))
        limit = spec.outlier_factor * best
        numbers = {level: i for i, level in enumerate(self.domain.levels)}
        rows: list[Numbers] = []
        kl: list[float] = []
        for assignment, result in self.measured.items():
            if result.kl < limit:
                rows.append([None if level is None else numbers[level] for level in assignment])
                kl.append(result.kl)
        return Surrogate(self.domain.errors).draw(rows, kl, rng)

    def solve(self, losses: Sequence[Floats], costs: CostTable, resolution: int) -> Assignment:
        """The assignment that loses least at a cost."""
        options = [
            [Option(option.cost, float(x)) for option, x in zip(group, loss, strict=True)]
            for group, loss in zip(costs.options, losses, strict=True)
        ]
        numbers = allocate(options, costs.limit, resolution).numbers
        return tuple(self.domain.levels[i] for i in numbers)

    def allocated(self, costs: CostTable) -> Assignment:
        """The assignment that loses least at a cost, by what is known."""
        return self.solve(self.losses(), costs, self.domain.spec.final_resolution)

    def draws(self, costs: CostTable, rng: np.random.Generator) -> list[Assignment]:
        """A generation of candidates: what loses least by the mean, and by draws."""
        spec = self.domain.spec
        losses = [self.losses(), *(self.losses(rng) for _ in range(spec.generation - 1))]
        return [self.solve(each, costs, spec.resolution) for each in losses]

    def ranked(self) -> list[Assignment]:
        """What compresses every group and was measured to the end, the best first."""
        pairs = sorted(self.complete(), key=lambda pair: (pair[1].kl, str(pair[0])))
        return [assignment for assignment, _ in pairs]

    def complete(self) -> list[tuple[Assignment, Measurement]]:
        """What compresses every group and was measured to the end, in that order."""
        return [
            (assignment, result)
            for assignment, result in self.measured.items()
            if result.complete and None not in assignment
        ]

    def summary(self) -> str:
        """How much is known, and how good the best is."""
        count = f"{len(self.measured)} measured"
        best = min((result.kl for _, result in self.complete()), default=None)
        return count if best is None else f"{count}, best KL {best:.4g}"


class Explorer:
    """Measures assignments and learns from them. Everything it proposes follows from the seed and from what
    was measured, so a study that was interrupted goes on as it would have. ``at_once``: so many trials are
    taken at a time where processes share them (None: a generation, or as many as workers measure)."""

    def __init__(
        self,
        domain: SearchDomain,
        trials: Trials,
        evaluator: Evaluator,
        on_measured: OnMeasured,
        at_once: int | None = None,
    ) -> None:
        self.domain = domain
        self._trials, self._evaluator, self._on_measured = trials, evaluator, on_measured
        self._at_once = at_once or max(evaluator.parallel, domain.spec.generation)
        self._measured: dict[Assignment, Measurement] = {}
        self._rng = np.random.default_rng(domain.seed)
        self._center: Assignment | None = None

    @property
    def observations(self) -> Observations:
        """What is known so far."""
        return Observations(self.domain, dict(self._measured))

    def measure(self, assignments: Sequence[Assignment], around: Assignment | None) -> None:
        """Measure what is new among the assignments, near another; at most as many as are left."""
        fresh = [each for each in dict.fromkeys(assignments) if each not in self._measured]
        fresh = fresh[: self.domain.most - len(self._measured)]
        count, summary = len(self._measured), self.observations.summary()

        def run(part: Sequence[Assignment]) -> Iterator[Measurement]:
            nonlocal count
            if part and around is not None and around != self._center:
                self._evaluator.center_on(around)
                self._center = around
            for result in self._evaluator.measure(part):
                count += 1
                self._on_measured(count, summary)
                yield result

        results = self._trials.measure(fresh, run, self._at_once)
        self._measured.update(zip(fresh, results, strict=True))
        self._on_measured(len(self._measured), self.observations.summary())

    def probe(self) -> None:
        """Measure every group alone at a few levels."""
        self.measure(self.domain.probes(), (None,) * self.domain.size)

    def refine(self, costs: CostTable) -> None:
        """Measure draws from what is known, each solved for the cost, until there were enough, or nothing
        new comes."""
        idle = 0
        while len(self._measured) < self.domain.most and idle < self.domain.spec.patience:
            before, known = len(self._measured), self.observations
            leader = next(iter(known.ranked()), None)
            self.measure(known.draws(costs, self._rng), leader)
            idle = idle + 1 if len(self._measured) == before else 0
