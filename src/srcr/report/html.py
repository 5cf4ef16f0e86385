"""From runs to one HTML file: no network, no other file, no script but the report's own.

Everything that comes from artefacts is untrusted text: the template escapes it, and the page's policy
allows the report's two scripts, by hash, and no request at all.
"""

import base64
import difflib
import hashlib
import math
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from srcr.environment import format_bytes
from srcr.errors import InputError
from srcr.records.evaluation import Evaluation
from srcr.records.routing import expert_loads
from srcr.records.sensitivity import SensitivityTable
from srcr.records.sharing import shareable
from srcr.report import layers, plots, table
from srcr.report.runs import Run, load_runs, load_searches, load_tables
from srcr.report.searches import SearchHistory, search_history
from srcr.storage.files import check_new_file, write_text

#: Worst prompts in the whole report, at most ten a run, and characters of each text: they bound its size.
WORST = 240
CLIP = 320
#: Tasks that a page suggests where none were run: the bundled ones are in the bundled model's language alone.
TASKS, ENGLISH = "--tasks", "arc_easy,hellaswag"
#: Searches whose candidates are drawn.
SEARCHES = 6
#: Bytes of a page, and of how many runs the details are kept when those of all would be too many.
LIMIT = 1_950_000
DETAILED = (48, 24, 12, 6, 3, 1)


@dataclass(frozen=True)
class Headline:
    """The run that the first screen speaks of, why it, and what it kept by which measure."""

    index: int
    why: str
    kept: str = ""
    interval: str = ""
    measure: str = ""


def write_report(paths: Sequence[str | Path], out: Path, overwrite: bool = False) -> None:
    """Read the runs at ``paths`` and write their report; ``out`` appears whole or not at all.

    Raises:
        InputError: nothing usable at ``paths``, or ``out`` cannot be written.

    >>> write_report(["small"], Path("report.html"))
    """
    check_new_file(out, overwrite)
    runs, tables, searches = load_runs(paths), load_tables(paths), load_searches(paths)
    histories = [search_history(name, search) for name, search in searches]
    write_text(out, build_report(runs, tables=tables, searches=histories))


def build_report(
    runs: Sequence[Run],
    title: str | None = None,
    tables: Sequence[SensitivityTable] = (),
    searches: Sequence[SearchHistory] = (),
) -> str:
    """The report of ``runs``, of ``searches``, and heat maps of ``tables`` of losses, as one self-contained
    HTML page. Where the details of all runs would make it larger than 2 MB, those of the best are kept (all
    stay in the table and the plots).

    Raises:
        InputError: there are no runs.
    """
    if not runs:
        raise InputError("no run was given: name folders of compressed models or evaluation files")
    runs = [replace(shareable(run), name=run.name) for run in runs]  # the page may be passed on
    best = sorted(range(len(runs)), key=lambda index: _rank(runs[index]))
    for kept in (len(runs), *(n for n in DETAILED if n < len(runs))):
        page = _page(runs, frozenset(best[:kept]), title, tables, searches)
        if len(page.encode()) <= LIMIT:
            break
    return page


def _page(
    runs: Sequence[Run],
    detailed: frozenset[int],
    title: str | None,
    tables: Sequence[SensitivityTable],
    searches: Sequence[SearchHistory],
) -> str:
    """The page, with the details of some of the runs."""
    bases = list(dict.fromkeys(short(run.base) for run in runs))
    chosen = headline(runs)
    detailed |= {chosen.index}
    drawn = [each for each in searches if each.candidates][:SEARCHES]
    data = _data(runs, detailed) | {"chosen": chosen.index}
    data["searches"] = [plots.finite(each.figures()) for each in drawn]
    columns = table.columns(runs)
    rated = {run.base: run.rates for run in runs if run.rates}
    scripts = [_own("plotly-basic.min.js"), _own("report.js")]
    return _environment().get_template("report.html.j2").render(
        title=title or f"{', '.join(bases)}, compressed",
        runs=runs,
        columns=columns,
        base_rows={base: table.base_row(columns, rates) for base, rates in rated.items()},
        searches=drawn,
        n_searches=len(searches),
        single=len(runs) == 1,
        chosen=chosen,
        best=runs[chosen.index],
        bases=bases,
        n_texts=len({_text_hash(run) for run in runs} - {None}),
        modes=sorted({plots.mode(run) for run in runs}),
        structures=sorted({table.structure(run) for run in runs}),
        data=data,
        map=table.rate_map(runs),
        heat_maps=[table.loss_map(each) for each in tables],
        policy=_policy(scripts),
        scripts=[Markup(script) for script in scripts],
        style=Markup(_own("report.css")),
        detailed=detailed,
        tasks_option=TASKS,
        n_worst=max(2, min(10, WORST // len(detailed))),
    )  # fmt: skip


def headline(runs: Sequence[Run]) -> Headline:
    """The run with the best SrCr; without any, the smallest KL; without any, the fewest bytes."""
    choices: tuple[tuple[str, Callable[[Run], float | None]], ...] = (
        ("best SrCr", _minus_srcr),
        ("smallest KL", _kl),
        ("smallest on disk", lambda run: run.rates.stored_bytes if run.rates else None),
    )
    for why, measure in choices:
        # A search's other finalists are not on disk: the page speaks of one that is.
        here = [(run, index) for index, run in enumerate(runs) if run.folder]
        values = ((measure(run), index) for run, index in here or zip(runs, count(), strict=False))
        known = [(value, index) for value, index in values if value is not None]
        if known:
            index = min(known)[1]
            return _kept(index, f"{why} of {len(runs)} runs" if len(runs) > 1 else "", runs[index])
    return Headline(0, "")


def _kept(index: int, why: str, run: Run) -> Headline:
    evaluation = run.evaluation
    if evaluation and evaluation.sr is not None:
        return Headline(
            index, why, table.percent(evaluation.sr), table.percents(evaluation.sr_ci95),
            "of the base's task scores above chance (semantic retention, Sr)",
        )  # fmt: skip
    if evaluation and evaluation.divergence:
        top1 = evaluation.divergence.top1_agreement
        return Headline(
            index, why, table.percent(top1.value), table.percents(top1.ci95),
            "of the base's next-token choices (top-1 agreement)",
        )  # fmt: skip
    return Headline(index, why)


def _rank(run: Run) -> tuple[float, float]:
    """Best first: by SrCr, then by KL."""
    srcr, kl = _minus_srcr(run), _kl(run)
    return (math.inf if srcr is None else srcr, math.inf if kl is None else kl)


def _minus_srcr(run: Run) -> float | None:
    value = run.evaluation.srcr if run.evaluation else None
    return -value if value is not None and math.isfinite(value) else None


def _kl(run: Run) -> float | None:
    divergence = run.evaluation.divergence if run.evaluation else None
    return divergence.kl.value if divergence and math.isfinite(divergence.kl.value) else None


def _text_hash(run: Run) -> str | None:
    text = run.evaluation.text if run.evaluation else None
    return text.sha256 if text else None


def _data(runs: Sequence[Run], detailed: frozenset[int]) -> dict[str, Any]:
    """What the page's script draws."""

    def each(draw: Callable[[Evaluation], Any]) -> list[Any]:
        return [
            draw(run.evaluation) if index in detailed and run.evaluation else None
            for index, run in enumerate(runs)
        ]

    data: dict[str, Any] = plots.finite({
        "names": [run.name for run in runs],
        "summaries": [table.summary(run) for run in runs],
        "tradeoff": {
            outcome.key: {size.key: plots.tradeoff(runs, outcome, size) for size in plots.AXES}
            for outcome in plots.OUTCOMES
        } if len(runs) > 1 else {},
        "layers": layers.layer_data(runs, detailed),
        "histograms": each(lambda e: plots.histogram(e.divergence.kl) if e.divergence else None),
        "tasks": each(lambda e: plots.task_figure(e.tasks) if e.tasks else None),
    })  # fmt: skip
    return data


def word_diff(base: str, compressed: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Both texts in pieces, each with whether it differs from the other text."""
    left, right = (re.findall(r"\s+|\w+|[^\w\s]", clip(text)) for text in (base, compressed))
    pieces: tuple[list[tuple[str, bool]], list[tuple[str, bool]]] = ([], [])
    matcher = difflib.SequenceMatcher(None, left, right, autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        for side, words in zip(pieces, (left[a:b], right[c:d]), strict=True):
            if words:
                side.append(("".join(words), kind != "equal"))
    return pieces


def clip(text: str) -> str:
    """The text, cut where it is very long."""
    return text if len(text) <= CLIP else text[:CLIP] + " …"


def short(model: str) -> str:
    """A model's name without the folders above it; hub ids stay whole."""
    return Path(model).name if model.startswith(("/", ".", "~")) else model


def evaluate_command(run: Run, options: str) -> str:
    """The command that fills what is missing in a run, and measures again what it had."""
    if options == TASKS:
        options = f"--tasks {'bundled' if run.base == 'bundled' else ENGLISH}"
    parts = ["srcr evaluate", shlex.quote(run.base), shlex.quote(run.folder or run.name)]
    evaluation = run.evaluation
    if evaluation and evaluation.tasks and "--tasks" not in options:
        given = re.search(r"--tasks[ =](\S+)", evaluation.command)
        parts.append(f"--tasks {given[1] if given else ','.join(evaluation.tasks)}")
    if evaluation and evaluation.semantic and "--semantic" not in options:
        parts.append("--semantic")
    parts += [options] if options else []
    return " ".join([*parts, "--report", *(["--overwrite"] if evaluation else [])])


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("srcr", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    shown = (
        table.percent, table.percents, table.number, table.numbers, table.smaller, table.structure,
        table.summary, plots.mode, plots.method, plots.curve_points, layers.by_type, format_bytes, short,
        clip, word_diff, evaluate_command, expert_loads,
    )  # fmt: skip
    environment.filters |= {function.__name__: function for function in shown}
    return environment


def _own(name: str) -> str:
    return files("srcr.report").joinpath(name).read_text(encoding="utf-8")


def _policy(scripts: Sequence[str]) -> str:
    """Content security policy: these scripts, inline style, images made by the page, nothing else."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
