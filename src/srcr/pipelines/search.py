"""search(): the configuration that keeps the most meaning at a size, or the smallest that keeps enough.

Cheap first, measured last. One walk fills the level database; each group is measured alone at a few levels;
what is known predicts every assignment; draws from the prediction, solved for the budget, are measured on a
text of their own; the best are compressed again from the start, beside the uniform configurations, chosen on
a third text and measured on a fourth.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from srcr.data.specs import Calibration, RecoveryText, Source, check_text
from srcr.environment import release_memory
from srcr.errors import InputError
from srcr.models.checkpoint import ModelLike
from srcr.pipelines.compress import compress
from srcr.pipelines.evaluate import evaluate
from srcr.pipelines.folder import write_search
from srcr.pipelines.levels import fill_database, open_context, open_evaluator, open_to_search
from srcr.pipelines.options import Output, RunOptions
from srcr.pipelines.progress import stage, tell
from srcr.pipelines.recover import recover
from srcr.pipelines.training import check_held_out, check_memory
from srcr.planning.bisect import smallest_plan
from srcr.planning.evaluators.ray import connected
from srcr.planning.finalists import (
    Decision,
    FinalistRunner,
    choice_score,
    decide,
    searched_finalists,
    uniform_finalists,
)
from srcr.planning.memory import SearchPolicy
from srcr.planning.objective import EvaluationData, value_score
from srcr.planning.problem import SearchProblem, search_problem
from srcr.planning.proposals import Explorer, Observations, SearchDomain
from srcr.planning.space import Assignment, SearchSpace
from srcr.planning.specs import SearchSpec
from srcr.planning.structured import structured_plans
from srcr.planning.table import level_errors, sensitivity_table, single_kl
from srcr.planning.trials import Trials, TrialsSpec
from srcr.plans.objective import Constraint
from srcr.plans.plan import CompressionPlan, Target
from srcr.records.evaluation import Evaluation
from srcr.records.search import Measurement, SearchResult
from srcr.records.sensitivity import SensitivityTable
from srcr.serialize import from_dict, read_json
from srcr.storage.atomic import atomic_output
from srcr.storage.layout import EVALUATION, JOURNAL, LOCK, RECORD, SEARCH


@torch.no_grad()
def search(
    model: ModelLike,
    target: Target | Constraint,
    space: SearchSpace | None,
    calibration: Calibration | Source,
    output: Output | str | Path,
    spec: SearchSpec = SearchSpec(),
    options: RunOptions = RunOptions(),
) -> SearchResult:
    """Find the configuration that keeps the most of ``model`` at the size ``target``, or the smallest (by
    TCr) that meets a constraint, and write it to ``output`` with ``search.json``: every finalist, how it
    was chosen, and what it keeps of text that nothing before has seen. ``space`` None: the default levels.

    Returns what is in ``search.json``.

    Raises:
        InputError: as :func:`srcr.compress`; a target out of reach; too little text; a storage, database or
            cluster that cannot be used; with ``resume`` an output of another search.
        SrcrError: no configuration meets the constraint; the disk refuses.

    >>> search("bundled", Target(tcr=0.8125), None, "bundled", "searched").finalists[0].rates.tcr
    0.8125
    """
    started = time.monotonic()
    output, calibration = Output.of(output), Calibration.of(calibration)
    check_text(calibration)
    opened, space, name = open_to_search(model, target, space, output, spec, options)
    context, policy = open_context(
        opened, space, calibration, spec.measurement, spec.finalists, options
    )
    problem = search_problem(context, target, space, name, spec)
    if spec.recovery is not None:
        check_memory(opened, spec.recovery, context.blocks.device, options)
        check_held_out(context.splits.choice)
    done = _finished(output, problem)
    if done is not None:
        tell(f"already done: {output.folder}", options.quiet)
        return done
    with atomic_output(output.folder, opened.folder, output.overwrite, output.resume) as journal:
        journal.begin(problem.run_settings)
        journal.retain()
        work = _Work(problem, spec, policy, journal.folder, options)
        explored = _explore(work)
        release_memory()
        decision = _train(work, _decide(work, explored))
        result = _result(work, explored, decision, time.monotonic() - started)
        return _install(work, decision, result)


@dataclass(frozen=True, eq=False)
class _Work:
    """A search under way: its problem, how it goes, what its memory allows, and the ``folder`` it writes
    into."""

    problem: SearchProblem
    spec: SearchSpec
    policy: SearchPolicy
    folder: Path
    options: RunOptions


@dataclass(frozen=True, eq=False)
class _Explored:
    """What was observed, and what was ``allocated`` before candidates were drawn (None: under a constraint
    none are); every trial of the study; and the table of losses."""

    observations: Observations
    allocated: Assignment | None
    trials: dict[Assignment, Measurement]
    table: SensitivityTable


def _finished(output: Output, problem: SearchProblem) -> SearchResult | None:
    """The result of a finished OUT, where it is what this search would give.

    Raises:
        InputError: OUT is there, but was made otherwise.
    """
    folder, path = output.folder, output.folder / SEARCH
    if not output.resume or not (folder / RECORD).is_file():
        return None
    remedy = "choose another name, or use --overwrite"
    differing = ["command (it is not that of a search)"]
    if path.is_file():
        try:
            result = from_dict(SearchResult, read_json(path), str(path))
        except InputError:
            if output.overwrite:
                return None
            raise
        if result.fingerprint == problem.fingerprint:
            return result
        settings, known = problem.settings, result.settings
        differing = [key for key in settings | known if known.get(key) != settings.get(key)]
        differing = differing if known else ["version of srcr"]  # which did not write them
    if output.overwrite:
        return None
    raise InputError(
        f"output {folder} is finished, with another {' and '.join(differing)}: {remedy}"
    )


def _explore(work: _Work) -> _Explored:
    """Fill the level database, and measure candidates."""
    problem, spec, context = work.problem, work.spec, work.problem.context
    storage = spec.storage or f"sqlite:///{(work.folder / 'study.db').resolve()}"
    study = spec.study or f"srcr-{problem.study_fingerprint[:16]}"
    trials = Trials(TrialsSpec(storage, study, problem.study_fingerprint), context.groups)
    place = work.folder / "levels"
    with connected(spec.resources.ray) as ray:
        database = fill_database(context, problem.space, spec.resources, place, ray, work.options)
        measurement = replace(spec.measurement, cache_bytes=work.policy.cache_bytes)
        evaluator = open_evaluator(context, database, ray, measurement)
        errors = level_errors(context, database, problem.space)
        domain = SearchDomain(
            problem.space.levels, errors, context.seed, spec.trials, spec.exploration
        )
        # Others may share a storage that was named: they find more to do when little is taken at a time.
        at_once = evaluator.parallel if spec.storage else None
        with stage("search", spec.trials, work.options.quiet) as bar:
            explorer = Explorer(domain, trials, evaluator, bar.reach, at_once)
            allocated = _measure(explorer, problem)
        known = explorer.observations
        table = sensitivity_table(context, problem.space, database, single_kl(known.measured))
    return _Explored(known, allocated, trials.results(), table)


def _measure(explorer: Explorer, problem: SearchProblem) -> Assignment | None:
    """Measure uniform candidates, every group alone, and draws from what is known; what was allocated before
    these. Under a constraint groups alone: every size that it comes to has its own plan."""
    if isinstance(problem.target, Constraint):
        explorer.probe()
        return None
    costs = problem.cost_table(problem.target)
    explorer.measure([explorer.domain.uniform(level) for level in problem.uniform], None)
    explorer.probe()
    allocated = explorer.observations.allocated(costs)
    explorer.measure([allocated], None)
    explorer.refine(costs)
    return allocated


def _decide(work: _Work, explored: _Explored) -> Decision:
    """Compress the finalists, choose, and measure all."""
    problem = work.problem
    runner = _runner(work)
    if isinstance(problem.target, Constraint):
        plans = _smallest(problem, problem.target, explored.observations, work.spec, runner)
    else:
        assert explored.allocated is not None
        assignments = searched_finalists(explored.observations, problem.uniform, explored.allocated)
        plans = {name: problem.plan(each, problem.target) for name, each in assignments.items()}
        plans |= structured_plans(
            problem, problem.target, explored.observations, work.spec.structures
        )
    return decide(plans, problem.objective, problem.choice, problem.test, runner)


def _smallest(
    problem: SearchProblem,
    constraint: Constraint,
    known: Observations,
    spec: SearchSpec,
    runner: FinalistRunner,
) -> dict[str, CompressionPlan]:
    """The plan with the highest TCr that meets the constraint on the choice data, and uniform ones of that
    rate."""

    def plan_at(rate: float) -> CompressionPlan:
        target = Target(tcr=rate)
        return problem.plan(known.allocated(problem.cost_table(target)), target)

    def evaluate_plan(name: str, plan: CompressionPlan) -> Evaluation:
        runner.compress_all({name: plan})
        return runner.evaluate_all({name: plan}, problem.choice)[0]

    rate, smallest = smallest_plan(
        constraint, problem.tcr_span, plan_at, evaluate_plan, spec.tcr_precision
    )
    target = Target(tcr=rate)
    uniform = uniform_finalists(known, problem.uniform_at(target))
    plans = {name: problem.plan(each, target) for name, each in uniform.items()}
    return plans | {"allocated": smallest}


def _runner(work: _Work) -> FinalistRunner:
    """Compresses and evaluates finalists of the open model."""
    context, options = work.problem.context, work.options

    def compress_finalist(plan: CompressionPlan, folder: Path) -> None:
        place = Output(folder, work.problem.format_name, resume=True)
        compress(
            context.opened, place, plan, context.splits.calibration, replace(options, seed=None)
        )

    def evaluate_finalists(folders: Sequence[Path], data: EvaluationData) -> list[Evaluation]:
        return evaluate(
            context.opened, folders, data.text, data.tasks, data.semantic,
            replace(options, seed=context.seed),
        )  # fmt: skip

    def announce(name: str) -> None:
        tell(f"finalist: {name}", options.quiet)

    return FinalistRunner(
        work.folder / "finalists",
        work.policy.finalists,
        compress_finalist,
        evaluate_finalists,
        announce,
    )


def _train(work: _Work, decision: Decision) -> Decision:
    """The decision after the chosen model was trained, where that is asked for and a gain: another finalist
    then, measured as all are. Its best state is chosen on the choice text."""
    spec, context, chosen = work.spec.recovery, work.problem.context, decision.winner
    if spec is None:
        return decision
    splits, folder = context.splits, work.folder / "trained"
    source = "self" if splits.calibration.source == "self" else splits.calibration
    length = splits.calibration.input_ids.shape[1]
    text = RecoveryText((source,), seq_len=length, held_out=splits.choice)
    options = replace(work.options, seed=context.seed)
    output = Output(folder, resume=True)
    record = recover(context.opened, decision.folder, output, spec, text, options)
    if not (record.recoveries or ())[-1].accepted:
        return decision
    runner = _runner(work)
    choice, test = (
        runner.evaluate([folder], data)[0] for data in (work.problem.choice, work.problem.test)
    )
    objective = work.problem.objective
    trained, untrained = choice_score(objective, choice), decision.choice[decision.chosen]
    if value_score(objective, trained.value) > value_score(objective, untrained.value):
        return decision
    name = f"{decision.chosen}, trained"
    return Decision(
        name,
        folder,
        decision.choice | {name: trained},
        (*decision.finalists, replace(test, compressed=name, plan=chosen.plan)),
    )


def _result(work: _Work, explored: _Explored, decision: Decision, seconds: float) -> SearchResult:
    """The record of the search; every trial, the best first."""
    problem = work.problem
    numbers = {each: number for number, each in enumerate(explored.observations.measured, 1)}
    trials = sorted(
        explored.trials.items(), key=lambda pair: (not pair[1].complete, pair[1].kl, str(pair[0]))
    )
    return SearchResult(
        model=problem.context.opened.name,
        target=problem.target,
        command=work.options.command,
        trials=len(trials),
        seconds=round(seconds, 3),
        groups=tuple(group.names for group in problem.context.groups),
        sensitivity=explored.table,
        measured=tuple(
            replace(measurement, number=numbers.get(assignment))
            for assignment, measurement in trials
        ),
        chosen=decision.chosen,
        objective=problem.objective,
        choice=decision.choice,
        finalists=decision.finalists,
        fingerprint=problem.fingerprint,
        settings=problem.settings,
    )


def _install(work: _Work, decision: Decision, result: SearchResult) -> SearchResult:
    """The result as it is written; the winner's files become those of the output, and the work goes."""
    kept = {path.name for path in decision.folder.iterdir()} | {SEARCH, EVALUATION, JOURNAL, LOCK}
    for path in decision.folder.iterdir():
        path.replace(work.folder / path.name)
    winner = replace(decision.winner, plan=None, command=work.options.command)
    result = write_search(work.folder, result, winner)
    for path in work.folder.iterdir():
        if path.name not in kept and path.is_dir():
            shutil.rmtree(path)
        elif path.name not in kept:
            path.unlink()
    return result
