"""The artefacts of a run, read back: ``srcr.json``, ``plan.yaml`` and evaluations."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from srcr.errors import InputError
from srcr.plans.plan import CompressionPlan
from srcr.records.evaluation import Evaluation
from srcr.records.run import Rates, RunRecord
from srcr.records.search import SearchSummary
from srcr.records.sensitivity import SensitivityTable
from srcr.serialize import from_dict, from_yaml, read_json
from srcr.storage.layout import EVALUATION, PLAN, RECORD, SEARCH


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

    An evaluation is joined to the folder that it names, given or on disk; that of a file takes the place of
    the folder's own ``evaluation.json``.

    Raises:
        InputError: nothing was given, a path does not exist, a file is not JSON or not srcr's, or two files
            evaluate the same model.
    """
    if not paths:
        raise InputError("no run was given: name folders of compressed models or evaluation files")
    runs: dict[Path, Run] = {}
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            runs.setdefault(path.resolve(), _folder(path))
            for run in _finalists(path):
                runs.setdefault(path.resolve() / "finalists" / run.name, run)
        elif path.is_file():
            if _table(path) is None:
                files.append(path)
        else:
            raise InputError(f"{path} does not exist")
    _join(files, runs)
    return _distinct(runs)


def _join(files: Sequence[Path], runs: dict[Path, Run]) -> None:
    """Add the evaluations of files to the runs that they name, or as runs of their own.

    Raises:
        InputError: two evaluate the same model.
    """
    origin: dict[Path, Path] = {}
    for file in files:
        for evaluation in _evaluations(file):
            key, known = _place(evaluation, file, runs)
            if key in origin:
                raise InputError(
                    f"{origin[key]} and {file} both evaluate {evaluation.compressed}: give one of them"
                    if origin[key] != file
                    else f"{file} evaluates {evaluation.compressed} twice"
                )
            origin[key] = file
            runs[key] = replace(known, evaluation=evaluation)


def load_tables(paths: Sequence[str | Path]) -> list[SensitivityTable]:
    """The sensitivity tables among the paths: files of ``srcr sensitivity``, and those of a search."""
    tables = []
    for path in map(Path, paths):
        if path.is_dir() and (path / SEARCH).is_file():
            tables.append(_search(path).sensitivity)
        elif path.is_file():
            tables.append(_table(path))
    return [table for table in tables if table is not None]


def load_searches(paths: Sequence[str | Path]) -> list[tuple[str, SearchSummary]]:
    """What searches measured, by the names of the folders that they wrote."""
    folders = [path for path in map(Path, paths) if (path / SEARCH).is_file()]
    return [(folder.resolve().name, _search(folder)) for folder in dict.fromkeys(folders)]


def _table(path: Path) -> SensitivityTable | None:
    """The sensitivity table in a file; None where it is something else."""
    data = read_json(path)
    if isinstance(data, dict) and "calibration" in data and {"groups", "units"} & data.keys():
        return from_dict(SensitivityTable, data, where=str(path))
    return None


def _search(folder: Path) -> SearchSummary:
    """What a search wrote into a folder."""
    return from_dict(SearchSummary, read_json(folder / SEARCH), where=str(folder / SEARCH))


def _finalists(folder: Path) -> Iterator[Run]:
    """What a search compressed besides what it chose: it is not on disk any more."""
    if not (folder / SEARCH).is_file():
        return
    search = _search(folder)
    for evaluation in search.finalists:
        if evaluation.compressed != search.chosen:
            yield Run(evaluation.compressed, None, evaluation.plan, evaluation)


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
    data = read_json(path)
    if not isinstance(data, dict) or "rates" not in data:
        raise InputError(f"{path} was not written by srcr compress: it has no 'rates'")
    return from_dict(RunRecord, data, where=str(path))


def _evaluations(path: Path) -> Iterator[Evaluation]:
    data = read_json(path)
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


def _place(evaluation: Evaluation, file: Path, runs: dict[Path, Run]) -> tuple[Path, Run]:
    """Where the evaluated model lies, and what is known of it."""
    named = Path(evaluation.compressed)
    places = [place.resolve() for place in (named, file.parent / named, file.parent / named.name)]
    for place in places:
        if place in runs and _same(evaluation, runs[place]):
            return place, runs[place]
    for place in places:
        if (place / RECORD).is_file() and _same(evaluation, run := _folder(place)):
            return place, run
    return places[0], Run(name=named.name or evaluation.compressed, folder=evaluation.compressed)


def _same(evaluation: Evaluation, run: Run) -> bool:
    """Whether a folder can be the model that was evaluated: its plan is the same, as far as known."""
    known = run.record.plan_fingerprint if run.record else None
    return not (known and evaluation.plan_fingerprint) or known == evaluation.plan_fingerprint


def _distinct(runs: dict[Path, Run]) -> list[Run]:
    """The runs, those with the same name told apart by the folder above."""
    shared = Counter(run.name for run in runs.values())
    named = [
        replace(run, name=f"{path.parent.name}/{run.name}") if shared[run.name] > 1 else run
        for path, run in runs.items()
    ]
    again = Counter(run.name for run in named)
    return [
        replace(run, name=str(path)) if again[run.name] > 1 else run
        for path, run in zip(runs, named, strict=True)
    ]
