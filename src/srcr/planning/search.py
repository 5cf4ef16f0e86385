"""search(): the configuration that keeps the most meaning at a size, or the smallest that keeps enough.

Cheap first, measured last. One walk fills the level database; the units' errors, put to scale by what was
measured, predict every choice; draws from the prediction, solved for the budget, are measured on a text of
their own; the best are compressed again from the start, beside the uniform configurations, chosen on a third
text and measured on a fourth.
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
import torch

from srcr import progress
from srcr.calibration import Tokens
from srcr.compression import BATCH_TOKENS, Calibration, Output, compress, pick_device, versions
from srcr.errors import InputError, SrcrError
from srcr.evaluation import evaluate
from srcr.files import EVALUATION, SEARCH
from srcr.formats import get_format
from srcr.formats.checkpoint import check_output, whole_or_nothing, write_json
from srcr.formats.journal import MARK
from srcr.models.load import load_model, resolve, sha256, weight_files
from srcr.models.weights import ModelWeights, open_weights
from srcr.planning.allocation import Option, allocate
from srcr.planning.budget import Budget
from srcr.planning.building import Space, build, check_room, context, database_bytes
from srcr.planning.candidates import Choice, Measured
from srcr.planning.constraint import Constraint, Objective
from srcr.planning.database import LevelDatabase
from srcr.planning.levels import Decision, Level, decisions
from srcr.planning.sensitivity import subset
from srcr.planning.surrogate import Numbers, Surrogate
from srcr.planning.texts import Texts, load_texts
from srcr.planning.trials import Trials
from srcr.planning.uniform import (
    check_reachable,
    cost_of,
    nearby,
    reference_level,
    uniform_levels,
)
from srcr.planning.workers import Bench, Crew, crew
from srcr.types import CompressionPlan, Target, to_dict

#: Candidates proposed at a time, from the same knowledge.
GENERATION = 16
#: Levels at which each unit is measured alone.
PROBES = 3
#: What is so many times as far away as the best says nothing of what is near it.
FAR = 4.0
#: Partial choices kept while proposals are solved; the final allocation keeps more.
COARSE = 512
#: Searched choices that are compressed again from the start.
FINALISTS = 2
#: Uniform joint configurations that are, the best by what was measured.
UNIFORMS = 2
#: Bits of TCr between which the smallest model under a constraint is enclosed.
PRECISION = 0.005
import os

AROUND_REFERENCE = bool(os.environ.get("AROUND"))


@dataclass(frozen=True)
class SearchSpec:
    """How long to search, and with what: ``trials`` candidates measured; Optuna's ``storage`` (a database
    URL; None: SQLite beside the work) and its ``study`` (None: named by the settings, so that processes with
    the same ones share it); ``ray`` address; the level ``database``'s folder (None: beside the work) and how
    many bytes it may take."""

    trials: int = 200
    storage: str | None = None
    study: str | None = None
    ray: str | None = None
    database: Path | None = None
    database_limit: int | None = None
    objective: Objective = Objective()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise InputError(f"trials {self.trials} must be at least 1")


@dataclass(frozen=True, eq=False)
class Field:
    """What a search works on."""

    source: ModelWeights
    folder: Path
    units: tuple[Decision, ...]
    space: Space
    texts: Texts
    budget: Budget
    seed: int
    device: str

    @property
    def options(self) -> list[list[Option]]:
        """What every unit costs at every level; losses are not known."""
        return [
            [
                Option(sum(self.budget.cost(n, level) for n in unit.names), 0.0)
                for level in self.space.levels
            ]
            for unit in self.units
        ]

    def plan(self, choice: Choice, target: Target | None) -> CompressionPlan:
        """The plan of a choice: what of the budget is left over is given back to pruned layers."""
        levels = {
            name: level
            for unit, level in zip(self.units, choice, strict=True)
            for name in unit.names
            if level is not None
        }
        plan = self.space.plan(fill(levels, self.budget), self.source.topology, self.seed)
        return replace(plan, target=target)


def fill(levels: Mapping[str, Level], budget: Budget) -> dict[str, Level]:
    """The levels with fewer zeros, as far as the budget goes: by TCr, where zeros count, and from the layer
    with the most."""
    found = dict(levels)
    if not budget.counts_zeros:
        return found
    left = budget.limit - sum(budget.cost(name, level) for name, level in found.items())
    for name in sorted(found, key=lambda name: (-found[name].sparsity, name)):
        level, (rows, cols) = found[name], budget.shapes[name]
        if level.sparsity == 0 or left < level.num_bits:
            continue
        pruned = round(level.sparsity * rows * cols)
        pruned -= min(pruned, left // level.num_bits)
        finer = Level(pruned / (rows * cols), level.num_bits)
        left -= budget.cost(name, finer) - budget.cost(name, level)
        found[name] = finer
    return found


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
    """Find the configuration that keeps the most of ``model`` at the size ``target``, or the smallest that
    meets a constraint, and write it to ``output.path`` with ``search.json``: every finalist, how it was
    chosen, and what it keeps of text that nothing before has seen.

    Returns what is in ``search.json``.

    Raises:
        InputError: as :func:`srcr.compress`; a target out of reach; a storage, database or cluster that
            cannot be used.
        SrcrError: no configuration meets the constraint; the disk refuses.
    """
    started = time.monotonic()
    folder = resolve(model)
    check_output(output.path, folder, output.overwrite, output.resume)
    if output.resume and (output.path / SEARCH).is_file():
        found = json.loads((output.path / SEARCH).read_text(encoding="utf-8"))
        progress.console().print(f"already done: {output.path}")
        assert isinstance(found, dict)
        return found
    where = pick_device(device)
    fmt = get_format(output.format or "compressed-tensors")
    with progress.stage("load", 1, quiet) as bar:
        source = open_weights(folder, where)
        bar.note(str(model), advance=1)
    sought = target if isinstance(target, Target) else Target(tcr=target.start)
    budget = Budget.of(sought, source, space.treatment, fmt)
    units = decisions(source.topology)
    with progress.stage("texts", 1, quiet) as bar:
        texts = load_texts(
            calibration, load_model(folder).to(where), folder, seed,
            lambda done, total: bar.reach(done / total, f"{calibration.source}: {done} tokens"),
        )  # fmt: skip
        bar.reach(1, f"{calibration.source}: {len(texts.calibration.input_ids)} sequences to calibrate, "
                  f"{len(texts.search.input_ids)} to search, as many to choose and to measure")  # fmt: skip
    base_sha256 = sha256(weight_files(folder))
    uniform = uniform_levels(budget, [level.num_bits for level in space.levels])
    levels = space.levels if isinstance(target, Constraint) else nearby(space.levels, budget)
    space = replace(space, levels=tuple(sorted({*levels, *uniform})))
    fields = Field(source, folder, units, space, texts, budget, seed, where.type)
    base_bits = 16 * sum(rows * cols for rows, cols in source.topology.shapes.values())
    check_reachable(fields.options or [[]], budget, base_bits)
    if not uniform:
        uniform = [min(space.levels, key=lambda level: cost_of(budget, level))]
    fingerprint = {
        "model": base_sha256, "texts": _hash([to_part.sha256 for to_part in _parts(texts)]),
        "target": _hash(to_dict(target)), "levels": _hash(to_dict(space)), "seed": str(seed),
        "format": output.format or "", "objective": _hash(to_dict(spec.objective)), **versions(),
    }  # fmt: skip
    with whole_or_nothing(output.path, folder, output.overwrite, output.resume) as journal:
        journal.begin(fingerprint)
        journal.keep()
        partial = journal.folder
        database = _database(fields, spec, base_sha256, reference_level(uniform), partial, quiet)
        name = spec.study or f"srcr-{_hash(fingerprint)[:16]}"
        storage = spec.storage or f"sqlite:///{partial / 'study.db'}"
        trials = Trials(storage, name, _hash(fingerprint), units)
        bench = Bench(folder, database.folder, database.context, units, texts.search.input_ids,
                      source.dtype, where.type)  # fmt: skip
        with crew(bench, spec.ray) as workers:
            found = _explore(fields, uniform, database, trials, workers, spec.trials, quiet)
        if isinstance(target, Constraint):
            raise SrcrError("constraints are not built yet")
        plans = _finalists(fields, found, uniform, target)
        report = _decide(fields, str(model), plans, spec.objective, output, partial, command, quiet)
        report = {
            "model": str(model), "target": to_dict(target), "command": command,
            "seconds": round(time.monotonic() - started, 3), "trials": len(trials),
            "units": [list(unit.names) for unit in units],
            "measured": _measured(trials.results()), **report,
        }  # fmt: skip
        _install(partial, report)
    return report


def _parts(texts: Texts) -> tuple[Tokens, ...]:
    return texts.calibration, texts.search, texts.choice, texts.test


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _measured(results: Mapping[Choice, Measured]) -> list[dict[str, Any]]:
    """Every candidate, best first."""
    rows = sorted(results.items(), key=lambda item: (not item[1].whole, item[1].kl))
    return [
        {"kl": result.kl, "whole": result.whole, "levels": [str(level) for level in choice]}
        for choice, result in rows
    ]


class _Steps:
    """Moves the bar of the walk that fills the database."""

    def __init__(self, bar: progress.Bar, blocks: int) -> None:
        self._bar, self._blocks = bar, blocks

    def step(self, block: int, what: str) -> None:
        self._bar.note(f"block {block + 1}/{self._blocks} {what}", advance=1)


def _database(
    fields: Field, spec: SearchSpec, base_sha256: str, reference: Level, partial: Path, quiet: bool
) -> LevelDatabase:
    """Every unit at every level, around the reference."""
    source, topology = fields.source, fields.source.topology
    place = spec.database or partial / "levels"
    needed = database_bytes(fields.units, fields.space.levels, topology)
    free = shutil.disk_usage(partial).free
    check_room(needed, spec.database_limit, free)
    if not quiet:
        progress.console().print(
            f"level database: {len(fields.units)} units at {len(fields.space.levels)} levels, about "
            f"{needed / 1e6:.1f} MB in {place}"
        )
    prefix: Choice = (reference,) * len(fields.units) if AROUND_REFERENCE else ()
    calibration = fields.texts.calibration
    key = context(fields.space, base_sha256, calibration.sha256, fields.device, prefix)
    database = LevelDatabase(place, key)
    batches = torch.split(
        calibration.input_ids, max(1, BATCH_TOKENS // calibration.input_ids.shape[1])
    )
    steps = sum(len(block.units) + 1 for block in topology.blocks) - 1
    with progress.stage("levels", steps, quiet) as bar:
        watcher = _Steps(bar, len(topology.blocks))
        build(source, batches, fields.space, database, fields.units, prefix, watcher)
        bar.reach(steps, f"{len(fields.units)} units, {len(fields.space.levels)} levels")
    return database


@dataclass(frozen=True, eq=False)
class _Found:
    """What exploring has found: the choice allocated from what was predicted before any search, and all
    that was measured."""

    allocated: Choice
    measured: dict[Choice, Measured]


def _explore(
    fields: Field, uniform: Sequence[Level], database: LevelDatabase, trials: Trials, workers: Crew,
    n: int, quiet: bool,
) -> _Found:  # fmt: skip
    """Measure the uniform choices, the allocated one, and then draws from what is known, until ``n`` are."""
    units, levels = fields.units, fields.space.levels
    number = {level: i for i, level in enumerate(levels)}
    errors = [
        np.array([_error(database, fields, unit, level) for level in levels]) for unit in units
    ]
    costs = [[option.cost for option in unit] for unit in fields.options]
    measured: dict[Choice, Measured] = {}
    rng = np.random.default_rng(fields.seed)
    with progress.stage("search", n, quiet) as bar:

        def measure(choices: Sequence[Choice], around: Choice | None) -> None:
            fresh = [c for c in dict.fromkeys(choices) if c not in measured][: n - len(measured)]

            def run(some: Sequence[Choice]) -> Iterator[Measured]:
                if some and around is not None:
                    workers.stand_at(around)
                for result in workers.measure(some):
                    bar.note(_best(measured), advance=1)
                    yield result

            results = trials.measure(fresh, run, max(workers.at_once, GENERATION))
            measured.update(zip(fresh, results, strict=True))
            bar.reach(len(measured), _best(measured))

        def solve(losses: Sequence[np.ndarray], resolution: int) -> Choice:
            options = [
                [Option(c, float(x)) for c, x in zip(cost, loss, strict=True)]
                for cost, loss in zip(costs, losses, strict=True)
            ]
            chosen = allocate(options, fields.budget.limit, resolution).choice
            return tuple(levels[i] for i in chosen)

        dense: Choice = (None,) * len(units)
        everywhere: list[Choice] = [(level,) * len(units) for level in uniform]
        measure(everywhere, None)
        probed = subset(levels, min(PROBES, (n // 2) // len(units)))
        measure(
            [(*dense[:i], level, *dense[i + 1 :]) for i in range(len(units)) for level in probed],
            dense,
        )
        best = measured[_leader(measured)].kl

        def known(limit: float) -> tuple[list[Numbers], list[float]]:
            rows = [(c, m.kl) for c, m in measured.items() if m.kl < limit]
            numbers = [[None if x is None else number[x] for x in c] for c, _ in rows]
            return numbers, [kl for _, kl in rows]

        surrogate = Surrogate(errors)
        allocated = solve(surrogate.draw(*known(FAR * best), None), 8 * COARSE)
        measure([allocated], None)
        idle = 0
        while len(measured) < n and idle < 3:
            rows = known(FAR * best)
            draws = [surrogate.draw(*rows, None)]
            draws += [surrogate.draw(*rows, rng) for _ in range(GENERATION - 1)]
            before = len(measured)
            measure([solve(draw, COARSE) for draw in draws], _leader(measured))
            idle = idle + 1 if len(measured) == before else 0
    return _Found(allocated, measured)


def _error(database: LevelDatabase, fields: Field, unit: Decision, level: Level) -> float:
    """The mean relative error of a unit's linears, by their weights."""
    entry = database.find(unit.names, level)
    if entry is None:  # nothing is done at this level
        return 0.0
    sizes = {name: rows * cols for name, (rows, cols) in fields.source.topology.shapes.items()}
    total = sum(sizes[name] for name in unit.names)
    return sum(sizes[name] * entry.errors[name] for name in unit.names) / total


def _leader(measured: Mapping[Choice, Measured]) -> Choice:
    """The best so far that treats every unit."""
    return min((m.kl, str(c), c) for c, m in _complete(measured))[2]


def _complete(measured: Mapping[Choice, Measured]) -> list[tuple[Choice, Measured]]:
    """What treats every unit and was measured to the end."""
    return [(c, m) for c, m in measured.items() if m.whole and None not in c]


def _best(measured: Mapping[Choice, Measured]) -> str:
    whole = [m.kl for _, m in _complete(measured)]
    return f"{len(measured)} measured, best KL {min(whole):.4g}" if whole else ""


def _finalists(
    fields: Field, found: _Found, uniform: Sequence[Level], target: Target
) -> dict[str, CompressionPlan]:
    """Names and plans of what is compressed again: uniform, allocated, searched."""
    chosen: dict[str, Choice] = {}
    ranked = sorted(uniform, key=lambda level: found.measured[(level,) * len(fields.units)].kl)
    joint = [level for level in ranked if level.sparsity > 0][:UNIFORMS]
    for level in [level for level in ranked if level.sparsity == 0] + joint:
        zeros = f"{100 * level.sparsity:.4g} % + " if level.sparsity else ""
        chosen[f"uniform {zeros}{level.num_bits} bits"] = (level,) * len(fields.units)
    chosen["allocated"] = found.allocated
    best = sorted((m.kl, str(c), c) for c, m in _complete(found.measured))
    searched = [c for _, _, c in best if c not in chosen.values()]
    for i, choice in enumerate(searched[:FINALISTS]):
        chosen[f"searched {i + 1}"] = choice
    return {name: fields.plan(choice, target) for name, choice in chosen.items()}


def _decide(
    fields: Field, model: str, plans: Mapping[str, CompressionPlan], objective: Objective, output: Output,
    partial: Path, command: str, quiet: bool,
) -> dict[str, Any]:  # fmt: skip
    """Compress every finalist from the start, choose by the objective on the third text, and measure all on
    the fourth."""
    folders = {}
    for name, plan in plans.items():
        if not quiet:
            progress.console().print(f"finalist: {name}")
        place = partial / "finalists" / name.replace(" ", "-").replace("%", "percent")
        own = Output(place, output.format, resume=True)
        compress(model, plan, fields.texts.calibration, own, None, fields.device, command, quiet)
        folders[name] = place
    wanted = [str(path) for path in folders.values()]
    tasks, semantic = objective.tasks, objective.semantic
    chosen_on, measured_on = (
        evaluate(model, wanted, text, tasks, semantic, fields.seed, fields.device, quiet)
        for text in (fields.texts.choice, fields.texts.test)
    )
    names = list(folders)
    scores = {name: objective.score(found) for name, found in zip(names, chosen_on, strict=True)}
    winner = min(names, key=lambda name: (scores[name], names.index(name)))
    finalists = [
        {**found, "compressed": name, "plan": to_dict(plans[name])}
        for name, found in zip(names, measured_on, strict=True)
    ]
    return {
        "chosen": winner,
        "objective": to_dict(objective),
        "choice": {name: {"kl": found["divergence"]["kl"], "score": scores[name]}
                   for name, found in zip(names, chosen_on, strict=True)},
        "finalists": finalists,
        "folder": folders[winner].name,
    }  # fmt: skip


def _install(partial: Path, report: dict[str, Any]) -> None:
    """Make the winner's files those of the output, and drop the work."""
    winner = partial / "finalists" / report.pop("folder")
    keep = {path.name for path in winner.iterdir()}
    for path in winner.iterdir():
        path.replace(partial / path.name)
    mine = next(f for f in report["finalists"] if f["compressed"] == report["chosen"])
    write_json(partial / EVALUATION, {**{k: v for k, v in mine.items() if k != "plan"}})
    write_json(partial / SEARCH, report)
    for path in partial.iterdir():
        if path.name in keep | {SEARCH, EVALUATION, MARK}:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
