"""The artefacts of a run, read back: ``srcr.json``, ``plan.yaml`` and evaluations.

The types name what the report shows; what only newer or older versions write is left out.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from srcr.errors import InputError
from srcr.files import EVALUATION, PLAN, RECORD, SEARCH
from srcr.planning.sensitivity import Table
from srcr.types import Comparison, CompressionPlan, Rates, RunRecord, from_dict, from_yaml

Interval = tuple[float, float]


@dataclass(frozen=True)
class Measure:
    """A value and its 95 % interval."""

    value: float
    ci95: Interval | None = None


@dataclass(frozen=True)
class Kl:
    """Mean KL(base || compressed) in nats a token, and percentiles over tokens."""

    value: float
    ci95: Interval | None = None
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None
    p999: float | None = None


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of both models, and compressed over base."""

    base: float
    compressed: float
    ratio: Measure | None = None


@dataclass(frozen=True)
class Divergence:
    """How far the next-token distributions are apart."""

    kl: Kl
    top1_agreement: Measure
    perplexity: Perplexity
    n_tokens: int
    flips: Measure | None = None


@dataclass(frozen=True)
class Semantic:
    """Semantic consistency of continuations, with the chance level."""

    consistency: float
    chance: float
    normalised: float | None
    scorer: str
    n: int
    ci95: Interval | None = None
    normalised_ci95: Interval | None = None
    max_new_tokens: int | None = None
    exact: float | None = None
    source: str | None = None
    worst: tuple[Comparison, ...] = ()


@dataclass(frozen=True)
class Task:
    """One task's score on both models."""

    base: float
    compressed: float
    chance: float
    n: int
    retention: float | None = None
    ci95: Interval | None = None
    p_value: float | None = None
    flips: float | None = None
    metric: str = ""
    note: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """What ``srcr evaluate`` measured on one compressed model."""

    base: str
    compressed: str
    rates: Rates
    divergence: Divergence | None = None
    semantic: Semantic | None = None
    tasks: dict[str, Task] = field(default_factory=dict)
    sr: float | None = None
    sr_ci95: Interval | None = None
    srcr: float | None = None
    srcr_ci95: Interval | None = None
    text: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    seconds: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    plan_fingerprint: str | None = None


@dataclass(frozen=True)
class Run:
    """One compressed model: how it was made and what was measured, as far as known."""

    name: str
    record: RunRecord | None = None
    plan: CompressionPlan | None = None
    evaluation: Evaluation | None = None
    folder: str = ""

    @property
    def base(self) -> str:
        """The model it was made from."""
        source = self.evaluation or self.record
        return source.base if source else "?"

    @property
    def rates(self) -> Rates | None:
        """How much smaller it is: the evaluation's count, else the record's."""
        source = self.evaluation or self.record
        return source.rates if source else None


def load_runs(paths: Sequence[str | Path]) -> list[Run]:
    """The runs in folders that ``srcr compress`` wrote and in files that ``srcr evaluate -o`` wrote.

    An evaluation is joined to the folder that it names, given or found on disk; one from a file
    takes the place of the folder's own ``evaluation.json``.

    Raises:
        InputError: nothing was given or found, a file is not JSON or not srcr's, or two files
            evaluate the same model.
    """
    if not paths:
        raise InputError("no run was given: name folders of compressed models or evaluation files")
    found: dict[Path, Run] = {}
    origin: dict[Path, Path] = {}
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            found.setdefault(path.resolve(), _folder(path))
            for run in _finalists(path):
                found.setdefault(path.resolve() / "finalists" / run.name, run)
        elif path.is_file():
            if _table(path) is None:
                files.append(path)
        else:
            raise InputError(f"{path} does not exist")
    for file in files:
        for evaluation in _evaluations(file):
            key, known = _place(evaluation, file, found)
            if key in origin:
                raise InputError(
                    f"{origin[key]} and {file} both evaluate {evaluation.compressed}: give one of them"
                    if origin[key] != file
                    else f"{file} evaluates {evaluation.compressed} twice"
                )
            origin[key] = file
            found[key] = replace(known, evaluation=evaluation)
    return _distinct(found)


def load_tables(paths: Sequence[str | Path]) -> list[Table]:
    """The tables of losses among the paths: files of ``srcr sensitivity``, and what a search found."""
    tables = []
    for path in map(Path, paths):
        if path.is_dir() and (path / SEARCH).is_file():
            data = _json(path / SEARCH).get("sensitivity")
            table = None if data is None else from_dict(Table, data, where=str(path / SEARCH))
        else:
            table = _table(path) if path.is_file() else None
        if table is not None:
            tables.append(table)
    return tables


def _table(path: Path) -> Table | None:
    """The table of losses in a file; None where it is something else."""
    data = _json(path)
    if isinstance(data, dict) and {"units", "treatment"} <= data.keys():
        return from_dict(Table, data, where=str(path))
    return None


def _finalists(folder: Path) -> Iterator[Run]:
    """What a search compressed besides what it chose: it is not on disk any more."""
    if not (folder / SEARCH).is_file():
        return
    data = _json(folder / SEARCH)
    for item in data.get("finalists", []):
        if item.get("compressed") != data.get("chosen"):
            plan = from_dict(CompressionPlan, item["plan"], where=str(folder / SEARCH))
            rest = {key: value for key, value in item.items() if key != "plan"}
            evaluation = from_dict(Evaluation, rest, where=str(folder / SEARCH))
            yield Run(evaluation.compressed, None, plan, evaluation)


def _folder(path: Path) -> Run:
    files = [path / name for name in (RECORD, PLAN, EVALUATION)]
    record, plan, evaluation = [file if file.is_file() else None for file in files]
    if record is None and evaluation is None:
        raise InputError(
            f"{path} holds neither {RECORD} nor {EVALUATION}: give a folder that srcr compress wrote"
        )
    several = list(_evaluations(evaluation)) if evaluation else [None]
    if len(several) != 1:
        raise InputError(f"{evaluation} must hold one evaluation, not {len(several)}")
    return Run(
        name=path.resolve().name,
        record=_record(record) if record else None,
        plan=from_yaml(CompressionPlan, plan) if plan else None,
        evaluation=several[0],
        folder=str(path),
    )


def _record(path: Path) -> RunRecord:
    data = _json(path)
    if not isinstance(data, dict) or "rates" not in data:
        raise InputError(f"{path} was not written by srcr compress: it has no 'rates'")
    return from_dict(RunRecord, data, where=str(path))


def _evaluations(path: Path) -> Iterator[Evaluation]:
    data = _json(path)
    items = data if isinstance(data, list) else [data]
    if not items:
        raise InputError(f"{path} is an empty list: write it with srcr evaluate -o")
    for item in items:
        if not isinstance(item, dict) or not {"base", "compressed", "rates"} <= item.keys():
            raise InputError(
                f"{path} is not an evaluation (an object with base, compressed and rates): give a "
                "file that srcr evaluate -o wrote, or a compressed model's folder"
            )
        yield from_dict(Evaluation, item, where=str(path))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None


def _place(evaluation: Evaluation, file: Path, found: dict[Path, Run]) -> tuple[Path, Run]:
    """Where the evaluated model lies, and what is known of it."""
    named = Path(evaluation.compressed)
    places = [place.resolve() for place in (named, file.parent / named, file.parent / named.name)]
    for place in places:
        if place in found and _same(evaluation, found[place]):
            return place, found[place]
    for place in places:
        if (place / RECORD).is_file() and _same(evaluation, run := _folder(place)):
            return place, run
    return places[0], Run(name=named.name or evaluation.compressed, folder=evaluation.compressed)


def _same(evaluation: Evaluation, run: Run) -> bool:
    """Whether a folder can be the model that was evaluated: its plan is the same, as far as known."""
    known = run.record.plan_fingerprint if run.record else None
    return not (known and evaluation.plan_fingerprint) or known == evaluation.plan_fingerprint


def _distinct(found: dict[Path, Run]) -> list[Run]:
    """The runs, those with the same name told apart by the folder above."""
    shared = Counter(run.name for run in found.values())
    named = [
        replace(run, name=f"{path.parent.name}/{run.name}") if shared[run.name] > 1 else run
        for path, run in found.items()
    ]
    again = Counter(run.name for run in named)
    return [
        replace(run, name=str(path)) if again[run.name] > 1 else run
        for path, run in zip(found, named, strict=True)
    ]
