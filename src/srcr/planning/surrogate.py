"""A guess of what every choice of levels loses, from the few that were measured.

The KL of a choice is taken as a sum over units of theta[unit, level] (the linearity that HIGGS, arXiv
2411.17525, theorem 1, shows for small errors), times a common factor where every unit is compressed. Before
anything is measured, theta is the unit's own output error times a rate; each unit's rate, and each level's
departure from it, is Gaussian around that. Measurements condition the Gaussian; draws from it, each solved
for the budget, are the candidates to measure next (Thompson sampling).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
#: A level's number for every unit; None where it is left as it is.
Numbers = Sequence[int | None]

#: Standard deviation of a unit's rate and of a level's departure from it, relative to what is expected.
UNIT, LEVEL = 1.0, 0.2
#: Of what a sum over units cannot say, relative to what was measured.
NOISE = 0.05


@dataclass(frozen=True, eq=False)
class Surrogate:
    """``errors``: of each unit the output errors of its levels, each > 0."""

    errors: Sequence[Floats]

    def draw(
        self, choices: Sequence[Numbers], kl: Sequence[float], rng: np.random.Generator | None
    ) -> list[Floats]:
        """Losses of every level of every unit, given that ``choices`` were measured to have these ``kl``: a
        draw, or with ``rng`` None the mean."""
        starts = np.cumsum([0, *(len(e) for e in self.errors)])
        errors = np.concatenate(self.errors)
        A = np.zeros((len(choices), len(errors)))
        for row, choice in enumerate(choices):
            for first, number in zip(starts[:-1], choice, strict=True):
                if number is not None:
                    A[row, first + number] = 1
        y = np.asarray(kl, np.float64)
        whole = A.sum(1) == len(self.errors)
        single = A.sum(1) == 1
        rates = self._rates(errors, A[single], y[single], starts, y[whole], A[whole])
        prior = rates * errors
        if whole.any():  # all errors together do not cost what they do one at a time
            y = np.where(whole, y / np.median(y[whole] / (A[whole] @ prior)), y)
        theta, residual = prior.copy(), y - A @ prior
        noise = NOISE * y
        if rng is not None:
            units = np.repeat(rng.standard_normal(len(self.errors)), np.diff(starts))
            theta = prior * (1 + UNIT * units + LEVEL * rng.standard_normal(len(prior)))
            residual = y - A @ theta - noise * rng.standard_normal(len(y))
        KA = np.empty((len(prior), len(y)))  # the prior's covariance times A^T
        for first, last in pairwise(starts):
            part, own = prior[first:last], A[:, first:last]
            KA[first:last] = UNIT**2 * np.outer(part, own @ part)
            KA[first:last] += (LEVEL * part[:, None]) ** 2 * own.T
        S = A @ KA + np.diag(noise**2 + 1e-300)
        theta = theta + KA @ np.linalg.solve(S, residual) if len(y) else theta
        return [theta[first:last] for first, last in pairwise(starts)]

    def _rates(
        self,
        errors: Floats,
        A: Floats,
        y: Floats,
        starts: npt.NDArray[np.int64],
        whole: Floats,
        B: Floats,
    ) -> Floats:
        """KL that an error of 1 stands for in each unit: by its single measurements (geometric mean), else
        that of all units."""
        own = np.full(len(self.errors), np.nan)
        logs = np.log(np.maximum(y, 1e-12) / np.maximum(A @ errors, 1e-30)) if len(y) else y
        for number, (first, last) in enumerate(pairwise(starts)):
            mine = A[:, first:last].sum(1) > 0 if len(y) else np.zeros(0, bool)
            if mine.any():
                own[number] = logs[mine].mean()
        common = np.nanmean(own) if np.isfinite(own).any() else 0.0
        if not np.isfinite(own).any() and len(whole):
            common = float(np.log(np.median(whole / (B @ errors))))
        rates = np.exp(np.where(np.isfinite(own), own, common))
        return np.repeat(rates, np.diff(starts))
