"""The value of an evaluation for an objective, and the data that finalists are compared on."""

from dataclasses import dataclass

from srcr.data.splits import ItemPart, Splits, prompts_of
from srcr.data.tokens import Tokens, context_length
from srcr.errors import InputError
from srcr.metrics.specs import SemanticSpec
from srcr.metrics.tasks import TaskSpec, resolve_tasks
from srcr.models.checkpoint import OpenModel
from srcr.plans.objective import LOWER_IS_BETTER, Constraint, Objective
from srcr.records.evaluation import Evaluation


@dataclass(frozen=True, eq=False)
class EvaluationData:
    """What an evaluation measures on: a ``text``, and where the objective needs them items of ``tasks`` and
    prompts to continue."""

    text: Tokens
    tasks: TaskSpec | None = None
    semantic: SemanticSpec | None = None


def check_objective(objective: Objective) -> None:
    """Refuse an objective by a task that is not known.

    Raises:
        InputError: names the task.
    """
    if objective.tasks:
        resolve_tasks(objective.tasks)


def check_measurable(objective: Objective, opened: OpenModel) -> None:
    """Refuse an objective that finalists could not be compared by, before there are any.

    Raises:
        InputError: a task that needs a tokenizer; continuations longer than the context.
    """
    if objective.tasks and opened.tokenizer is None:
        raise InputError(
            f"objective {objective.measure!r}: tasks are text, but {opened.name} has no tokenizer; use kl"
        )
    spec, limit = SemanticSpec(), context_length(opened.config)
    length = spec.prompt_len + spec.max_new_tokens
    if objective.measure == "semantic" and limit and length > limit:
        raise InputError(
            f"objective 'semantic': prompts of {spec.prompt_len} tokens and {spec.max_new_tokens} new ones "
            f"exceed the model's context of {limit}; use kl"
        )


def evaluation_data(objective: Objective, splits: Splits) -> tuple[EvaluationData, EvaluationData]:
    """What finalists are chosen by, and what they are measured on: no sequence, prompt or item is in both;
    prompts are pieces of these texts only.

    Raises:
        InputError: there is too little text for two sets of prompts.
    """
    prompts: tuple[Tokens | None, Tokens | None] = None, None
    if objective.measure == "semantic":
        spec = SemanticSpec()
        choice = prompts_of(splits.choice, spec.n, spec.prompt_len)
        prompts = choice, prompts_of(splits.test, spec.n, spec.prompt_len, excluded=choice)
    return (
        _data(objective, splits.choice, "choice", prompts[0]),
        _data(objective, splits.test, "test", prompts[1]),
    )


def _data(
    objective: Objective, text: Tokens, part: ItemPart, prompts: Tokens | None
) -> EvaluationData:
    tasks = TaskSpec(objective.tasks, objective.limit, part) if objective.tasks else None
    return EvaluationData(text, tasks, None if prompts is None else SemanticSpec(prompts=prompts))


def objective_value(objective: Objective, evaluation: Evaluation) -> float | None:
    """The objective's measure in an evaluation; None where it is undefined."""
    measure = objective.measure
    if measure in ("kl", "top1"):
        divergence = evaluation.divergence
        assert divergence is not None
        return divergence.kl.value if measure == "kl" else divergence.top1_agreement.value
    if measure == "semantic":
        assert evaluation.semantic is not None
        return evaluation.semantic.consistency
    if measure == "sr":
        return evaluation.sr
    if measure == "srcr":
        return evaluation.srcr
    if len(evaluation.tasks) != 1:  # a name that stands for several: their mean
        return evaluation.sr
    return next(iter(evaluation.tasks.values())).retention


def objective_score(objective: Objective, evaluation: Evaluation) -> float:
    """The measure so that lower is better.

    Raises:
        InputError: it is undefined for this model (the base is at chance).
    """
    return value_score(objective, objective_value(objective, evaluation))


def value_score(objective: Objective, value: float | None) -> float:
    """A value of the measure so that lower is better.

    Raises:
        InputError: it is undefined for this model (the base is at chance).
    """
    if value is None:
        raise InputError(
            f"objective {objective.measure!r} is undefined here: the base model is at chance; use kl"
        )
    return value if objective.measure in LOWER_IS_BETTER else -value


def holds(constraint: Constraint, evaluation: Evaluation) -> bool:
    """Whether an evaluation meets the constraint.

    Raises:
        InputError: its measure is undefined for this model.
    """
    lower = constraint.objective.measure in LOWER_IS_BETTER
    limit = constraint.bound if lower else -constraint.bound
    return objective_score(constraint.objective, evaluation) <= limit
