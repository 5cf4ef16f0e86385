"""The report's figures as Plotly's JSON, from runs. Pure: figures out, no files, no colours.

Colours belong to the page, which knows light from dark: a trace's ``meta.series`` numbers its colour and
``meta.runs`` names the run behind each point, so that the page can filter.
"""

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from srcr.environment import format_bytes
from srcr.records.estimate import Interval
from srcr.records.evaluation import KlEstimate, TaskScore
from srcr.records.recovery import RecoveryRecord
from srcr.records.run import Rates
from srcr.report.runs import Run

#: ``data`` (traces) and ``layout``.
Figure = dict[str, Any]


@dataclass(frozen=True)
class Axis:
    """One of the three sizes: how to say it, how to get it, and what the base has."""

    key: str
    title: str
    of: Callable[[Rates], float]
    base: Callable[[Rates], float]


AXES = (
    Axis("theoretical", "theoretical size: 1 − TCr, % of 16-bit",
         lambda r: 100 * (1 - r.tcr), lambda r: 100.0),
    Axis("stored", "stored: weight files on disk, MB",
         lambda r: r.stored_bytes / 1e6, lambda r: r.base_bytes / 1e6),
    Axis("loaded", "loaded: weights in memory, MB",
         lambda r: r.loaded_bytes / 1e6, lambda r: r.base_bytes / 1e6),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What was kept or lost: value and interval of a run, which way is better (1: up), and what the base
    itself has."""

    key: str
    symbol: str
    title: str
    of: Callable[[Run], tuple[float, Interval | None] | None]
    better: int
    base: float
    log: bool


def _sr(run: Run) -> tuple[float, Interval | None] | None:
    evaluation = run.evaluation
    if evaluation is None or evaluation.sr is None:
        return None
    return evaluation.sr, evaluation.sr_ci95


def _kl(run: Run) -> tuple[float, Interval | None] | None:
    divergence = run.evaluation.divergence if run.evaluation else None
    return (divergence.kl.value, divergence.kl.ci95) if divergence else None


OUTCOMES = (
    Outcome("sr", "Sr", "semantic retention Sr", _sr, 1, 1.0, log=False),
    Outcome("kl", "KL", "KL to the base, nats a token", _kl, -1, 0.0, log=True),
)


def dominators(points: Sequence[tuple[float, float]]) -> list[list[int]]:
    """For each (cost, value), which others cost no more and are worth no less, and differ in one.

    The Pareto front of any subset is the points none of whose dominators is in it.
    """
    return [
        [
            j
            for j, (cost_j, value_j) in enumerate(points)
            if cost_j <= cost and value_j >= value and (cost_j, value_j) != (cost, value)
        ]
        for cost, value in points
    ]


def method(run: Run) -> str:
    """What was applied, as "sparsegpt + gptq"."""
    if run.plan is None:
        return ""
    names = [layer.prune.method for layer in run.plan.layers if layer.prune and layer.sparsity]
    names += [layer.quant.method for layer in run.plan.layers if layer.quant]
    return " + ".join(dict.fromkeys(names)) or "none"


def mode(run: Run) -> str:
    """How the layers were solved: the mode where weights were pruned and quantized, else which of both."""
    if run.plan is None:
        return "unknown"
    pruned = any(layer.prune and layer.sparsity for layer in run.plan.layers)
    quantized = any(layer.quant for layer in run.plan.layers)
    if pruned and quantized:
        return run.plan.solver.mode
    return "quantization only" if quantized else "pruning only" if pruned else "untouched"


def axis(title: str, log: bool = False, **more: Any) -> dict[str, Any]:
    """An axis with a title; the page chooses the range and the ticks of a logarithmic one."""
    return {"title": {"text": title}, **({"type": "log"} if log else {}), **more}


def finite(value: Any) -> Any:
    """JSON types with null for what is not finite."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _spread(values: Sequence[tuple[float, Interval | None]]) -> dict[str, Any]:
    """Asymmetric error bars from intervals."""
    up = [max(0.0, ci[1] - value) if ci else 0.0 for value, ci in values]
    down = [max(0.0, value - ci[0]) if ci else 0.0 for value, ci in values]
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down}


def tradeoff(runs: Sequence[Run], outcome: Outcome, size: Axis) -> Figure | None:
    """Size against outcome, a colour for each mode, with the Pareto front and the base; None where no run
    has it."""
    rows = []
    for index, run in enumerate(runs):
        measure, rates = outcome.of(run), run.rates
        if measure and rates and math.isfinite(measure[0]):
            rows.append((index, run, rates, measure))
    if not rows:
        return None
    traces: list[dict[str, Any]] = []
    for series, name in enumerate(dict.fromkeys(mode(run) for run in runs)):
        shown = [row for row in rows if mode(row[1]) == name]
        traces.append({
            "type": "scatter", "mode": "markers", "name": name,
            "x": [size.of(rates) for _, _, rates, _ in shown],
            "y": [measure[0] for *_, measure in shown],
            "error_y": _spread([measure for *_, measure in shown]),
            "text": [_label(run, rates, measure) for _, run, rates, measure in shown],
            "meta": {"series": series, "runs": [index for index, *_ in shown]},
            "hovertemplate": f"%{{text}}<br>{outcome.symbol} %{{y:.4g}}<extra></extra>",
        })  # fmt: skip
    points = [(size.of(rates), outcome.better * measure[0]) for _, _, rates, measure in rows]
    order = sorted(range(len(rows)), key=lambda i: points[i])
    above = dominators(points)
    traces.append({
        "type": "scatter", "mode": "lines", "name": "Pareto front", "hoverinfo": "skip",
        "x": [size.of(rows[i][2]) for i in order],
        "y": [rows[i][3][0] for i in order],
        "meta": {
            "front": [[rows[j][0] for j in above[i]] for i in order],
            "runs": [rows[i][0] for i in order],
        },
    })  # fmt: skip
    traces.append(_bases([(run, rates) for _, run, rates, _ in rows], outcome, size))
    positive = all(value > 0 for *_, (value, _) in rows)
    log = outcome.log and positive
    return {
        "data": traces,
        "layout": {"xaxis": axis(size.title), "yaxis": axis(outcome.title, log)},
    }


def _bases(rows: Sequence[tuple[Run, Rates]], outcome: Outcome, size: Axis) -> dict[str, Any]:
    """The base of each run as a point of reference. A logarithmic axis has no place for a KL of 0: the page
    puts it at the foot."""
    points = {run.base: size.base(rates) for run, rates in rows}
    return {
        "type": "scatter", "mode": "markers", "name": "base", "meta": {"base": True, "labels": list(points)},
        "x": list(points.values()),
        "y": [outcome.base for _ in points],
        "text": [
            f"<b>{html.escape(name)}</b>, the base<br>{outcome.symbol} {outcome.base:g}" for name in points
        ],
        "hovertemplate": "%{text}<extra></extra>",
    }  # fmt: skip


def _label(run: Run, rates: Rates, measure: tuple[float, Interval | None]) -> str:
    ci95 = measure[1]
    interval = f"<br>95 % interval [{ci95[0]:.3g}, {ci95[1]:.3g}]" if ci95 else ""
    return (
        f"<b>{html.escape(run.name)}</b><br>{100 * rates.sparsity:.3g} % sparsity, {rates.bits:.3g} bits"
        f"<br>TCr {100 * rates.tcr:.4g} %, stored {format_bytes(rates.stored_bytes)}, "
        f"loaded {format_bytes(rates.loaded_bytes)}"
        f"{interval}"
    )


def task_figure(tasks: Mapping[str, TaskScore]) -> Figure:
    """Scores of both models with the chance level, and retention with its interval below."""
    names, scores = list(tasks), list(tasks.values())
    kept = [(name, t.retention, t.ci95) for name, t in tasks.items() if t.retention is not None]

    def bars(
        name: str, labels: Sequence[str], values: Sequence[float], **more: Any
    ) -> dict[str, Any]:
        x = [html.escape(label) for label in labels]
        meta = {"labels": list(labels), **more.pop("meta")}
        return {"type": "bar", "name": name, "x": x, "y": list(values), "meta": meta, **more}

    data = [
        bars("base", names, [t.base for t in scores], meta={"series": 3}),
        bars("compressed", names, [t.compressed for t in scores], meta={"series": 0}),
        bars(
            "chance", names, [t.chance for t in scores], meta={"ink": True}, type="scatter", mode="markers",
            marker={"symbol": "line-ew-open", "size": 30},
        ),
        bars(
            "retention", [name for name, *_ in kept], [value for _, value, _ in kept], meta={"series": 0},
            error_y=_spread([(value, ci95) for _, value, ci95 in kept]), showlegend=False, width=0.4,
            xaxis="x2", yaxis="y2",
        ),
    ]  # fmt: skip
    layout = {
        "xaxis": {"anchor": "y"}, "yaxis": axis("score", domain=[0.58, 1.0], rangemode="tozero"),
        "xaxis2": {"anchor": "y2"},
        "yaxis2": axis("retention", domain=[0.0, 0.42], rangemode="tozero", anchor="x2"),
    }  # fmt: skip
    return {"data": data, "layout": layout}


def histogram(kl: KlEstimate) -> dict[str, Any] | None:
    """Shares of the tokens, in percent, from the first octave of KL that has any to the last: ``low`` is the
    logarithm to base 2 of where the first begins. None where it was not counted."""
    counts = kl.histogram
    if counts is None or not any(counts.counts) or len(counts.counts) != len(counts.edges) + 1:
        return None
    total = sum(counts.counts)
    places = [i for i, count in enumerate(counts.counts) if count]
    shown = counts.counts[places[0] : places[-1] + 1]
    marks = {"mean": kl.value, "median": kl.p50, "95 %": kl.p95, "99 %": kl.p99}
    return {
        "low": math.log2(counts.edges[0]) + places[0] - 1,
        "below": places[0] == 0,
        "shares": [float(f"{100 * count / total:.4g}") for count in shown],
        "marks": {name: value for name, value in marks.items() if value is not None and value > 0},
    }


def curve_points(recovery: RecoveryRecord) -> str:
    """Points "x,y" of the KL at each look at the held-out text, in a box of 600 x 160 whose 0 lies at 150."""
    steps = max(1, recovery.curve[-1].step)
    highest = max(point.kl for point in recovery.curve) or 1.0
    return " ".join(
        f"{600 * point.step / steps:.1f},{150 - 140 * point.kl / highest:.1f}"
        for point in recovery.curve
    )
