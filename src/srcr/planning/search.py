"""search(): the configuration that keeps the most meaning at a size, or the smallest that keeps enough.

Cheap first, measured last. One walk fills the level database; each unit is measured alone at a few levels;
what is known predicts every choice; draws from the prediction, solved for the budget, are measured on a
text of their own; the best are compressed again from the start, beside the uniform configurations,
chosen on a third text and measured on a fourth.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from srcr import progress
from srcr.compression import Calibration, Output, compress, versions
from srcr.errors import InputError, SrcrError
from srcr.evaluation import evaluate
from srcr.files import EVALUATION, SEARCH
from srcr.formats import get_format
from srcr.formats.checkpoint import check_output, whole_or_nothing, write_json
from srcr.formats.journal import MARK
from srcr.models.load import resolve
from srcr.planning.allocation import Option, allocate
from srcr.planning.budget import Budget
from srcr.planning.building import Space
from srcr.planning.candidates import Choice, Measured
from srcr.planning.constraint import Constraint, Objective
from srcr.planning.database import LevelDatabase
from srcr.planning.field import NONE, Field, Resources, fill_database, open_field
from srcr.planning.levels import Level
from srcr.planning.plan import fill, unit_costs
from srcr.planning.sensitivity import PROBES, Table, losses_table, subset
from srcr.planning.surrogate import Numbers, Surrogate
from srcr.planning.trials import Trials
from srcr.planning.uniform import check_reachable, nearby, uniform_levels
from srcr.planning.workers import Crew, connected, crew
from srcr.types import CompressionPlan, Target, to_dict

#: Candidates proposed at a time, from the same knowledge.
GENERATION = 16
#: What loses so many times as much as the best says nothing of what is near it.
FAR = 4.0
#: Generations that bring nothing new before a search ends early.
PATIENCE = 3
#: Partial choices kept while proposals are solved.
COARSE = 512
#: Uniform joint configurations that are, beside quantization alone: the best by what was measured.
UNIFORMS = 1
#: TCr to which the smallest model under a constraint is found.
PRECISION = 0.005

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SearchSpec:
    """How long to search, and with what: ``trials`` candidates measured; Optuna's ``storage`` (a database
    URL; None: SQLite beside the work) and its ``study`` (None: named by the settings, so that processes with
    the same ones share it); the ``resources`` it may use; what finalists are chosen by."""

    trials: int = 200
    storage: str | None = None
    study: str | None = None
    resources: Resources = NONE
    objective: Objective = Objective()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise InputError(f"trials {self.trials} must be at least 1")


@dataclass(frozen=True, eq=False)
class _Hunt:
    """What one search works on: an open ``field``, the ``space`` it chooses from, and where it writes."""

    field: Field
    space: Space
    format_name: str
    objective: Objective
    partial: Path
    memory: str | None
    command: str
    quiet: bool

    def budget(self, target: Target) -> Budget:
        """What a target allows."""
        source = self.field.source
        return Budget.of(target, source, self.space.treatment, get_format(self.format_name))

    def plan(self, choice: Choice, budget: Budget, target: Target) -> CompressionPlan:
        """The plan of a choice: what of the budget is left over is given back to pruned layers."""
        levels = {
            name: level
            for unit, level in zip(self.field.units, choice, strict=True)
            for name in unit.names
            if level is not None
        }
        field = self.field
        plan = self.space.plan(fill(levels, budget), field.source.topology, field.seed)
        return replace(plan, target=target)


@torch.no_grad()
def search(
    model: str | Path,
    target: Target | Constraint,
    space: Space,
    calibration: Calibration,
    output: Output,
    spec: SearchSpec = SearchSpec(),
    seed: int = 0,
    device: str = "auto",
    command: str = "",
    quiet: bool = False,
) -> dict[str, Any]:
    """Find the configuration that keeps the most of ``model`` at the size ``target``, or the smallest (by
    TCr) that meets a constraint, and write it to ``output.path`` with ``search.json``: every finalist, how it
    was chosen, and what it keeps of text that nothing before has seen.

    Returns what is in ``search.json``.

    Raises:
        InputError: as :func:`srcr.compress`; a target out of reach; a storage, database or cluster that
            cannot be used.
        SrcrError: no configuration meets the constraint; the disk refuses.
    """
    started = time.monotonic()
    format_name = output.format or "compressed-tensors"
    get_format(format_name)
    check_output(output.path, resolve(model), output.overwrite, output.resume)
    if output.resume and (output.path / SEARCH).is_file():
        return _already_done(output, quiet)
    field = open_field(model, calibration, seed, device, quiet)
    uniform: list[Level] = []
    objective = target.objective if isinstance(target, Constraint) else spec.objective
    if isinstance(target, Target):
        budget = Budget.of(target, field.source, space.treatment, get_format(format_name))
        costs = unit_costs(field.units, space.levels, budget)
        check_reachable(costs, budget, field.source.topology)
        uniform = uniform_levels(budget, [level.num_bits for level in space.levels])
        space = replace(space, levels=tuple(sorted({*nearby(space.levels, budget), *uniform})))
    settings = {
        "model": field.sha256, "texts": _hash([t.sha256 for t in field.texts.parts()]),
        "target": _hash(to_dict(target)), "levels": _hash(to_dict(space)), "seed": str(seed),
        "format": format_name, "device": field.device, "precision": str(field.source.running),
        **versions(),
    }  # fmt: skip
    with whole_or_nothing(output.path, field.folder, output.overwrite, output.resume) as journal:
        journal.begin({**settings, "objective": _hash(to_dict(objective))})
        journal.keep()
        hunt = _Hunt(
            field,
            space,
            format_name,
            objective,
            journal.folder,
            spec.resources.memory,
            command,
            quiet,
        )
        storage = spec.storage or f"sqlite:///{(journal.folder / 'study.db').resolve()}"
        study = spec.study or f"srcr-{_hash(settings)[:16]}"
        trials = Trials(storage, study, _hash(settings), field.units)
        with connected(spec.resources.ray) as ray:
            place = journal.folder / "levels"
            database = fill_database(field, space, spec.resources, place, ray, quiet)
            workers = crew(field.bench(database), ray)
            explorer = _Explorer(hunt, database, trials, workers, spec.trials, bool(spec.storage))
            if isinstance(target, Constraint):
                plans = _smallest(explorer, target)
            else:
                plans = _finalists(explorer, uniform, target)
        report = _decide(hunt, plans)
        report = {
            "model": field.name, "target": to_dict(target), "command": command, "trials": len(trials),
            "seconds": round(time.monotonic() - started, 3),
            "units": [list(unit.names) for unit in field.units],
            "sensitivity": to_dict(_table(hunt, database, explorer.measured)),
            "measured": _measured(trials.results()), **report,
        }  # fmt: skip
        _install(journal.folder, report)
    return report


def _already_done(output: Output, quiet: bool) -> dict[str, Any]:
    found = json.loads((output.path / SEARCH).read_text(encoding="utf-8"))
    if not quiet:
        progress.console().print(f"already done: {output.path}")
    assert isinstance(found, dict)
    return found


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _measured(results: Mapping[Choice, Measured]) -> list[dict[str, Any]]:
    """Every candidate, best first."""
    rows = sorted(results.items(), key=lambda item: (not item[1].whole, item[1].kl, str(item[0])))
    return [
        {"kl": result.kl, "whole": result.whole, "levels": [x and str(x) for x in choice]}
        for choice, result in rows
    ]


def _table(hunt: _Hunt, database: LevelDatabase, measured: Mapping[Choice, Measured]) -> Table:
    """What was learnt of each unit alone, as ``srcr sensitivity`` writes it."""
    alone = {
        (i, level): found.kl
        for choice, found in measured.items()
        for i, level in enumerate(choice)
        if level is not None and sum(x is not None for x in choice) == 1
    }
    return losses_table(hunt.field, hunt.space, database, alone)


class _Explorer:
    """Measures choices and learns from them. Everything it proposes follows from the seed and from what was
    measured, so a study that was interrupted goes on as it would have."""

    def __init__(
        self,
        hunt: _Hunt,
        database: LevelDatabase,
        trials: Trials,
        workers: Crew,
        most: int,
        shared: bool,
    ) -> None:
        field, self.levels = hunt.field, hunt.space.levels
        self.hunt, self.units, self.most = hunt, field.units, most
        self.measured: dict[Choice, Measured] = {}
        self._trials, self._workers = trials, workers
        self._number = {level: i for i, level in enumerate(self.levels)}
        self._surrogate = Surrogate(
            [np.array([field.error(database, u, x) for x in self.levels]) for u in self.units]
        )
        self._rng = np.random.default_rng(field.seed)
        # Others may share a storage that was named: they find more to do when little is taken at a time.
        self._at_once = workers.at_once if shared else max(workers.at_once, GENERATION)
        self._around: Choice | None = None
        self._budget: Budget | None = None
        self._costs: list[list[Option]] = []

    def measure(self, choices: Sequence[Choice], around: Choice | None, bar: progress.Bar) -> None:
        """Measure what is new among some choices, near another."""
        fresh = [c for c in dict.fromkeys(choices) if c not in self.measured]
        fresh = fresh[: self.most - len(self.measured)]

        def run(some: Sequence[Choice]) -> Iterator[Measured]:
            if some and around is not None and around != self._around:
                self._workers.stand_at(around)
                self._around = around
            for result in self._workers.measure(some):
                bar.note(self._best(), advance=1)
                yield result

        results = self._trials.measure(fresh, run, self._at_once)
        self.measured.update(zip(fresh, results, strict=True))
        bar.reach(len(self.measured), self._best())

    def probe(self, bar: progress.Bar) -> None:
        """Measure every unit alone at a few levels."""
        dense: Choice = (None,) * len(self.units)
        levels = subset(self.levels, max(1, min(PROBES, self.most // 2 // len(self.units))))
        choices = [
            (*dense[:i], level, *dense[i + 1 :]) for i in range(len(self.units)) for level in levels
        ]
        self.measure(choices, dense, bar)

    def refine(self, budget: Budget, bar: progress.Bar) -> None:
        """Measure draws from what is known, each solved for the budget, until there were enough."""
        idle = 0
        while len(self.measured) < self.most and idle < PATIENCE:
            before = len(self.measured)
            draws = [self.losses(None), *(self.losses(self._rng) for _ in range(GENERATION - 1))]
            self.measure([self.solve(draw, budget) for draw in draws], self.leader(), bar)
            idle = idle + 1 if len(self.measured) == before else 0

    def losses(self, rng: np.random.Generator | None) -> list[Floats]:
        """The loss of every level of every unit by what is known: the mean, or a draw."""
        whole = [m.kl for _, m in self.complete()]
        limit = FAR * min(whole) if whole else float("inf")
        rows: list[Numbers] = []
        kl: list[float] = []
        for choice, found in self.measured.items():
            if found.kl < limit:
                rows.append([None if level is None else self._number[level] for level in choice])
                kl.append(found.kl)
        return self._surrogate.draw(rows, kl, rng)

    def solve(self, losses: Sequence[Floats], budget: Budget, resolution: int = COARSE) -> Choice:
        """The choice that loses least at a budget."""
        if budget is not self._budget:
            self._budget, self._costs = budget, unit_costs(self.units, self.levels, budget)
        costs = self._costs
        options = [
            [Option(option.cost, float(x)) for option, x in zip(unit, loss, strict=True)]
            for unit, loss in zip(costs, losses, strict=True)
        ]
        return tuple(self.levels[i] for i in allocate(options, budget.limit, resolution).choice)

    def complete(self) -> list[tuple[Choice, Measured]]:
        """What treats every unit and was measured to the end."""
        return [(c, m) for c, m in self.measured.items() if m.whole and None not in c]

    def leader(self) -> Choice | None:
        """The best of those so far."""
        found = [(m.kl, str(c), c) for c, m in self.complete()]
        return min(found)[2] if found else None

    def _best(self) -> str:
        whole = [m.kl for _, m in self.complete()]
        return f"{len(self.measured)} measured" + (f", best KL {min(whole):.4g}" if whole else "")


def _finalists(
    explorer: _Explorer, uniform: Sequence[Level], target: Target
) -> dict[str, CompressionPlan]:
    """Names and plans of what is compressed again: uniform, allocated, searched."""
    hunt, units = explorer.hunt, explorer.units
    budget = hunt.budget(target)
    everywhere: dict[Level, Choice] = {level: (level,) * len(units) for level in uniform}
    with progress.stage("search", explorer.most, hunt.quiet) as bar:
        explorer.measure(list(everywhere.values()), None, bar)
        explorer.probe(bar)
        allocated = explorer.solve(explorer.losses(None), budget, 8 * COARSE)
        explorer.measure([allocated], None, bar)
        explorer.refine(budget, bar)
    chosen = _uniform_finalists(explorer, everywhere)
    chosen["allocated"] = allocated
    best = sorted((m.kl, str(c), c) for c, m in explorer.complete())
    searched = [c for _, _, c in best if c not in chosen.values()]
    if searched:
        chosen["searched"] = searched[0]
    return {name: hunt.plan(choice, budget, target) for name, choice in chosen.items()}


def _uniform_finalists(
    explorer: _Explorer, everywhere: Mapping[Level, Choice]
) -> dict[str, Choice]:
    """Quantization alone, and of the joint ones the best by what was measured (else the least pruned)."""

    def rank(level: Level) -> tuple[float, Level]:
        found = explorer.measured.get(everywhere[level])
        return (found.kl if found else 0.0), level

    plain = [level for level in everywhere if level.sparsity == 0]
    joint = sorted((level for level in everywhere if level.sparsity > 0), key=rank)[:UNIFORMS]
    return {f"uniform {_said(level)}": everywhere[level] for level in [*plain, *joint]}


def _said(level: Level) -> str:
    zeros = f"{100 * level.sparsity:.4g} % + " if level.sparsity else ""
    return f"{zeros}{level.num_bits} bits"


def _smallest(explorer: _Explorer, constraint: Constraint) -> dict[str, CompressionPlan]:
    """The plan with the highest TCr that keeps the constraint on the third text, by bisection, and uniform
    ones of that rate."""
    hunt = explorer.hunt
    units, shapes = explorer.units, hunt.field.source.topology.shapes
    with progress.stage("search", explorer.most, hunt.quiet) as bar:
        explorer.probe(bar)
    base = 16 * sum(rows * cols for rows, cols in shapes.values())
    costs = unit_costs(units, explorer.levels, hunt.budget(Target(tcr=0.0)))
    low = 1 - sum(max(option.cost for option in unit) for unit in costs) / base
    high = 1 - sum(min(option.cost for option in unit) for unit in costs) / base
    held: tuple[float, CompressionPlan] | None = None
    failed: float | None = None
    while high - low > PRECISION:
        rate = round((low + high) / 2, 4)
        target = Target(tcr=rate)
        budget = hunt.budget(target)
        choice = explorer.solve(explorer.losses(None), budget, 8 * COARSE)
        plan = hunt.plan(choice, budget, target)
        found = _measure(hunt, {f"tcr {rate:.4f}": plan}, constraint.objective)[0]
        if constraint.holds(found):
            held, low = (rate, plan), rate
        else:
            failed, high = constraint.objective.value(found), rate
    if held is None:
        raise SrcrError(
            f"no plan meets {constraint.text}: even at tcr={high:.4f} it is {failed}; ask for less, or allow "
            "--widths up to 8"
        )
    target = Target(tcr=held[0])
    budget = hunt.budget(target)
    uniform = uniform_levels(budget, [level.num_bits for level in explorer.levels])
    everywhere: dict[Level, Choice] = {level: (level,) * len(units) for level in uniform}
    chosen = _uniform_finalists(explorer, everywhere)
    return {name: hunt.plan(choice, budget, target) for name, choice in chosen.items()} | {
        "allocated": held[1]
    }


def _measure(
    hunt: _Hunt, plans: Mapping[str, CompressionPlan], objective: Objective, last: bool = False
) -> list[dict[str, Any]]:
    """Compress every plan from the start, and evaluate all on the third text, or the ``last``."""
    field, folders = hunt.field, []
    for name, plan in plans.items():
        if not hunt.quiet and not last:
            progress.console().print(f"finalist: {name}")
        place = hunt.partial / "finalists" / _slug(name)
        folders.append(str(place))
        if last:
            continue
        own = Output(place, hunt.format_name, resume=True)
        compress(
            field.name, plan, field.texts.calibration, own, None, field.device, hunt.command, hunt.quiet,
            hunt.memory,
        )  # fmt: skip
    text = field.texts.test if last else field.texts.choice
    tasks, semantic = objective.tasks, objective.semantic
    return evaluate(
        field.name, folders, text, tasks, semantic, field.seed, field.device, hunt.quiet
    )


def _slug(name: str) -> str:
    return name.replace(" % +", "percent").replace(" ", "-")


def _decide(hunt: _Hunt, plans: Mapping[str, CompressionPlan]) -> dict[str, Any]:
    """Compress every finalist from the start, choose by the objective on the third text, and measure all on
    the fourth."""
    objective, names = hunt.objective, list(plans)
    chosen_on = _measure(hunt, plans, objective)
    scores = {name: objective.score(found) for name, found in zip(names, chosen_on, strict=True)}
    winner = min(names, key=lambda name: (scores[name], names.index(name)))
    finalists = [
        {**found, "compressed": name, "plan": to_dict(plans[name])}
        for name, found in zip(names, _measure(hunt, plans, objective, last=True), strict=True)
    ]
    return {
        "chosen": winner,
        "objective": to_dict(objective),
        "choice": {
            name: {"kl": found["divergence"]["kl"], "value": objective.value(found)}
            for name, found in zip(names, chosen_on, strict=True)
        },
        "finalists": finalists,
    }


def _install(partial: Path, report: dict[str, Any]) -> None:
    """Make the winner's files those of the output, and drop the work."""
    winner = partial / "finalists" / _slug(report["chosen"])
    keep = {path.name for path in winner.iterdir()} | {SEARCH, EVALUATION, MARK}
    for path in winner.iterdir():
        path.replace(partial / path.name)
    mine = next(f for f in report["finalists"] if f["compressed"] == report["chosen"])
    write_json(partial / EVALUATION, {key: value for key, value in mine.items() if key != "plan"})
    write_json(partial / SEARCH, report)
    for path in partial.iterdir():
        if path.name not in keep and path.is_dir():
            shutil.rmtree(path)
        elif path.name not in keep:
            path.unlink()
