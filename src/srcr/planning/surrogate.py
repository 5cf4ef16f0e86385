"""A guess of what every assignment of levels loses, from the few that were measured.

The KL of an assignment is taken as a sum over groups of theta[group, level] (the linearity that HIGGS, arXiv
2411.17525, theorem 1, shows for small errors), times a common factor where every group is compressed. Before
anything is measured, theta is the group's own output error times a rate; each group's rate, and each level's
departure from it, is Gaussian around that. Measurements condition the Gaussian; draws from it, each solved
for the budget, are the candidates to measure next (Thompson sampling).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
#: A level's number for every group; None where it is left as it is.
Numbers = Sequence[int | None]


@dataclass(frozen=True, eq=False)
class Surrogate:
    """``errors``: the output errors [levels] of each group, each > 0. Standard deviations, all relative:
    ``group_std`` of a group's rate (it is known to an order of magnitude before it is measured);
    ``level_std`` of a level's departure from its group's rate (what single measurements departed from it);
    ``noise_std`` of what a sum over groups cannot say, relative to what was measured."""

    errors: Sequence[Floats]
    group_std: float = 1.0
    level_std: float = 0.2
    noise_std: float = 0.05

    def draw(
        self, assignments: Sequence[Numbers], kl: Sequence[float], rng: np.random.Generator | None
    ) -> list[Floats]:
        """Losses [levels] of each group, given that ``assignments`` were measured to have these ``kl``: a
        draw, or with ``rng`` None the mean."""
        starts = np.cumsum([0, *(len(e) for e in self.errors)])
        A = self._design(assignments, starts)
        y = np.asarray(kl, np.float64)
        prior = self._rates(A, y, starts) * np.concatenate(self.errors)
        whole = A.sum(1) == len(self.errors)
        if whole.any():  # all errors together do not cost what they do one at a time
            y = np.where(whole, y / np.median(y[whole] / (A[whole] @ prior)), y)
        noise = self.noise_std * y
        theta, residual = prior.copy(), y - A @ prior
        if rng is not None:
            rates = np.repeat(rng.standard_normal(len(self.errors)), np.diff(starts))
            departures = rng.standard_normal(len(prior))
            theta = prior * (1 + self.group_std * rates + self.level_std * departures)
            residual = y - A @ theta - noise * rng.standard_normal(len(y))
        if len(y):
            KA = self._covariance(prior, A, starts)
            S = A @ KA + np.diag(noise**2 + 1e-300)
            theta = theta + KA @ np.linalg.solve(S, residual)
        return [theta[first:last] for first, last in pairwise(starts)]

    def _design(self, assignments: Sequence[Numbers], starts: npt.NDArray[np.int64]) -> Floats:
        """1 where an assignment has a group at a level: [assignments, groups x levels]."""
        A = np.zeros((len(assignments), starts[-1]))
        for row, assignment in enumerate(assignments):
            for first, number in zip(starts[:-1], assignment, strict=True):
                if number is not None:
                    A[row, first + number] = 1
        return A

    def _covariance(self, prior: Floats, A: Floats, starts: npt.NDArray[np.int64]) -> Floats:
        """The prior's covariance times A^T [groups x levels, assignments]."""
        KA = np.empty((len(prior), len(A)))
        for first, last in pairwise(starts):
            part, own = prior[first:last], A[:, first:last]
            KA[first:last] = self.group_std**2 * np.outer(part, own @ part)
            KA[first:last] += (self.level_std * part[:, None]) ** 2 * own.T
        return KA

    def _rates(self, A: Floats, y: Floats, starts: npt.NDArray[np.int64]) -> Floats:
        """KL that an error of 1 stands for in each group (repeated for its levels): by the measurements of
        that group alone (geometric mean), else that of all groups."""
        errors = np.concatenate(self.errors)
        own = np.full(len(self.errors), np.nan)
        if len(y):
            single = A.sum(1) == 1
            alone = A[single]
            logs = np.log(np.maximum(y[single], 1e-12) / np.maximum(alone @ errors, 1e-30))
            for number, (first, last) in enumerate(pairwise(starts)):
                measured = alone[:, first:last].sum(1) > 0
                if measured.any():
                    own[number] = logs[measured].mean()
        known = np.isfinite(own)
        common = np.nanmean(own) if known.any() else 0.0
        whole = A.sum(1) == len(self.errors)
        if not known.any() and whole.any():
            common = float(np.log(np.median(y[whole] / (A[whole] @ errors))))
        return np.repeat(np.exp(np.where(known, own, common)), np.diff(starts))
