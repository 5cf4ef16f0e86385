"""The best of what was measured, and uniform plans beside it: compressed from the start, chosen by the
objective on the choice text, and measured on the test text."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from srcr.planning.objective import EvaluationData, objective_score, objective_value
from srcr.planning.proposals import Observations
from srcr.planning.space import Assignment
from srcr.plans.objective import Objective
from srcr.plans.plan import CompressionPlan
from srcr.plans.specs import CompressionLevel
from srcr.records.evaluation import Evaluation
from srcr.records.search import ChoiceScore


class CompressFinalist(Protocol):
    """Compresses the model."""

    def __call__(self, plan: CompressionPlan, folder: Path) -> None:
        """Compress by a plan into a folder; what an earlier run finished there stays."""
        ...


class EvaluateFinalists(Protocol):
    """Evaluates compressed models."""

    def __call__(self, folders: Sequence[Path], data: EvaluationData) -> list[Evaluation]:
        """What each folder keeps of the model on some data, all held in memory together."""
        ...


@dataclass(frozen=True, eq=False)
class FinalistRunner:
    """Compresses finalists below ``folder``, and evaluates at most ``at_once`` of them together."""

    folder: Path
    at_once: int
    compress: CompressFinalist
    evaluate: EvaluateFinalists
    on_finalist: Callable[[str], None]

    def place(self, name: str, plan: CompressionPlan) -> Path:
        """Where a finalist lies: another plan of the same name lies elsewhere."""
        slug = name.replace(" % +", "percent").replace(" ", "-")
        return self.folder / f"{slug}-{plan.fingerprint()}"

    def compress_all(self, plans: Mapping[str, CompressionPlan]) -> None:
        """Compress every plan from the start."""
        for name, plan in plans.items():
            self.on_finalist(name)
            self.compress(plan, self.place(name, plan))

    def evaluate_all(
        self, plans: Mapping[str, CompressionPlan], data: EvaluationData
    ) -> list[Evaluation]:
        """What every plan, once compressed, keeps: as many at a time as fit."""
        folders = [self.place(name, plan) for name, plan in plans.items()]
        return [
            evaluation
            for start in range(0, len(folders), self.at_once)
            for evaluation in self.evaluate(folders[start : start + self.at_once], data)
        ]


@dataclass(frozen=True, eq=False)
class Decision:
    """The name of the finalist ``chosen`` and the ``folder`` it lies in, every finalist's score on the choice
    data, and what each keeps of the test data, by name and plan."""

    chosen: str
    folder: Path
    choice: dict[str, ChoiceScore]
    finalists: tuple[Evaluation, ...]

    @property
    def winner(self) -> Evaluation:
        """The chosen finalist."""
        return next(each for each in self.finalists if each.compressed == self.chosen)


def decide(
    plans: Mapping[str, CompressionPlan],
    objective: Objective,
    choice: EvaluationData,
    test: EvaluationData,
    runner: FinalistRunner,
) -> Decision:
    """Compress every plan, choose by the objective on the ``choice`` data, and measure all on the ``test``
    data.

    Raises:
        InputError: the objective is undefined for this model.
    """
    names = list(plans)
    runner.compress_all(plans)
    chosen_on = dict(zip(names, runner.evaluate_all(plans, choice), strict=True))
    scores = {name: objective_score(objective, each) for name, each in chosen_on.items()}
    winner = min(names, key=lambda name: (scores[name], names.index(name)))
    tested = runner.evaluate_all(plans, test)
    return Decision(
        winner,
        runner.place(winner, plans[winner]),
        {name: choice_score(objective, each) for name, each in chosen_on.items()},
        tuple(
            replace(each, compressed=name, plan=plans[name])
            for name, each in zip(names, tested, strict=True)
        ),
    )


def choice_score(objective: Objective, evaluation: Evaluation) -> ChoiceScore:
    """What an evaluation on the choice data says of a finalist."""
    assert evaluation.divergence is not None
    return ChoiceScore(evaluation.divergence.kl, objective_value(objective, evaluation))


def searched_finalists(
    known: Observations, uniform: Sequence[CompressionLevel], allocated: Assignment
) -> dict[str, Assignment]:
    """Finalists by name: uniform ones, what was ``allocated`` before candidates were drawn, and the best of
    all that was measured."""
    finalists = uniform_finalists(known, uniform) | {"allocated": allocated}
    others = (each for each in known.ranked() if each not in finalists.values())
    best = next(others, None)
    return finalists if best is None else finalists | {"searched": best}


def uniform_finalists(
    known: Observations, uniform: Sequence[CompressionLevel]
) -> dict[str, Assignment]:
    """Quantization alone, and of the joint ones the best by what was measured (else the least pruned)."""
    everywhere = {level: known.domain.uniform(level) for level in uniform}

    def rank(level: CompressionLevel) -> tuple[float, CompressionLevel]:
        result = known.measured.get(everywhere[level])
        return (result.kl if result else 0.0), level

    plain = [level for level in everywhere if level.sparsity == 0]
    joint = sorted((level for level in everywhere if level.sparsity > 0), key=rank)
    joint = joint[: known.domain.spec.joint_uniform]
    return {f"uniform {_readable(level)}": everywhere[level] for level in [*plain, *joint]}


def _readable(level: CompressionLevel) -> str:
    zeros = f"{100 * level.sparsity:.4g} % + " if level.sparsity else ""
    return f"{zeros}{level.num_bits} bits"
