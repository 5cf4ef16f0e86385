"""The report's figures, from runs. Pure: figures out, no files, no colours.

Colours belong to the page, which knows light from dark: a trace's ``meta.series`` numbers its colour
and ``meta.runs`` names the run behind each point, so that the page can filter.
"""

import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from srcr.environment import format_bytes
from srcr.records.estimate import Interval
from srcr.records.evaluation import TaskScore
from srcr.records.recovery import RecoveryRecord
from srcr.records.run import Rates
from srcr.report.runs import Run


@dataclass(frozen=True)
class Axis:
    """One of the three sizes: how to say it, and how to get it."""

    key: str
    title: str
    of: Callable[[Rates], float]


AXES = (
    Axis("theoretical", "theoretical size: 1 − TCr, % of 16-bit", lambda r: 100 * (1 - r.tcr)),
    Axis("stored", "stored: weight files on disk, MB", lambda r: r.stored_bytes / 1e6),
    Axis("loaded", "loaded: weights in memory, MB", lambda r: r.loaded_bytes / 1e6),
)


@dataclass(frozen=True)
class Outcome:
    """What was kept or lost: value and interval of a run, and which way is better (1: up)."""

    key: str
    symbol: str
    title: str
    of: Callable[[Run], tuple[float, Interval | None] | None]
    better: int
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
    Outcome("sr", "Sr", "semantic retention Sr", _sr, 1, log=False),
    Outcome("kl", "KL", "KL(base ‖ compressed), nats a token", _kl, -1, log=True),
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


def _spread(values: Sequence[tuple[float, Interval | None]]) -> dict[str, Any]:
    """Asymmetric error bars from intervals."""
    up = [max(0.0, ci[1] - value) if ci else 0.0 for value, ci in values]
    down = [max(0.0, value - ci[0]) if ci else 0.0 for value, ci in values]
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down}


def tradeoff(runs: Sequence[Run], outcome: Outcome, axis: Axis) -> dict[str, Any] | None:
    """Size against outcome, a colour for each mode, with the Pareto front; None where no run has it."""
    rows = []
    for index, run in enumerate(runs):
        measure, rates = outcome.of(run), run.rates
        if measure and rates and math.isfinite(measure[0]):
            rows.append((index, run, rates, measure))
    if not rows:
        return None
    figure = go.Figure()
    modes = list(dict.fromkeys(mode(run) for run in runs))
    for series, name in enumerate(modes):
        shown = [row for row in rows if mode(row[1]) == name]
        figure.add_scatter(
            x=[axis.of(rates) for _, _, rates, _ in shown],
            y=[measure[0] for *_, measure in shown],
            error_y=_spread([measure for *_, measure in shown]),
            text=[_label(run, rates, measure) for _, run, rates, measure in shown],
            mode="markers",
            name=name,
            meta={"series": series, "runs": [index for index, *_ in shown]},
            hovertemplate=f"%{{text}}<br>{outcome.symbol} %{{y:.4g}}<extra></extra>",
        )
    points = [(axis.of(rates), outcome.better * measure[0]) for _, _, rates, measure in rows]
    order = sorted(range(len(rows)), key=lambda i: points[i])
    above = dominators(points)
    figure.add_scatter(
        x=[axis.of(rows[i][2]) for i in order],
        y=[rows[i][3][0] for i in order],
        mode="lines",
        name="Pareto front",
        hoverinfo="skip",
        meta={
            "front": [[rows[j][0] for j in above[i]] for i in order],
            "runs": [rows[i][0] for i in order],
        },
    )
    figure.update_xaxes(title=axis.title)
    positive = all(value > 0 for *_, (value, _) in rows)
    figure.update_yaxes(title=outcome.title)
    if outcome.log and positive:
        figure.update_yaxes(type="log", dtick="D2")
    return _plain(figure)


def _label(run: Run, rates: Rates, measure: tuple[float, Interval | None]) -> str:
    ci95 = measure[1]
    interval = f"<br>95 % interval [{ci95[0]:.3g}, {ci95[1]:.3g}]" if ci95 else ""
    return (
        f"<b>{html.escape(run.name)}</b><br>{100 * rates.sparsity:.3g} % sparsity, {rates.bits:.3g} bits"
        f"<br>TCr {100 * rates.tcr:.4g} %, stored {format_bytes(rates.stored_bytes)}, "
        f"loaded {format_bytes(rates.loaded_bytes)}"
        f"{interval}"
    )


def layer_figure() -> dict[str, Any]:
    """Sparsity, bits and error of every layer, without the data: see :func:`layer_columns`."""
    figure = make_subplots(rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.07)
    for row, (title, template) in enumerate(
        (("sparsity, %", "%{y:.1f} %"), ("bits", "%{y:g}"), ("error", "%{y:.3g}")), 1
    ):
        figure.add_bar(
            name=title,
            hovertemplate=f"%{{text}}<br>{template}<extra></extra>",
            textposition="none",
            meta={"series": row - 1},
            row=row,
            col=1,
        )
        figure.update_yaxes(title=title, rangemode="tozero", row=row, col=1)
    figure.update_xaxes(title="layer, in the model's order", showgrid=False, row=3, col=1)
    figure.update_layout(showlegend=False, bargap=0.25)
    return _plain(figure)


def layer_names(run: Run) -> tuple[str, ...]:
    """The names of a run's layers, in the model's order."""
    return tuple(html.escape(layer.name) for layer in run.record.layers) if run.record else ()


def layer_columns(run: Run) -> list[list[float | None]] | None:
    """What :func:`layer_figure` shows of a run: sparsity in percent, bits, error; None if unknown."""
    if run.record is None or not run.record.layers:
        return None
    layers = run.record.layers
    return [
        [round(100 * layer.sparsity, 2) for layer in layers],
        [round(layer.bits, 2) for layer in layers],
        [float(f"{layer.error:.3g}") if math.isfinite(layer.error) else None for layer in layers],
    ]


@cache
def _score_panels() -> go.Layout:
    """Two panels, one above the other; kept, since plotly takes its time to build them."""
    titles = ("score", "retention, 95 % intervals")
    panels = make_subplots(rows=2, cols=1, subplot_titles=titles, vertical_spacing=0.18)
    return panels.update_yaxes(rangemode="tozero").layout


def task_figure(tasks: Mapping[str, TaskScore]) -> dict[str, Any]:
    """Scores of both models with the chance level, and retention with its interval."""
    figure = go.Figure(layout=_score_panels())
    names = [html.escape(name) for name in tasks]
    scores = list(tasks.values())
    figure.add_bar(x=names, y=[t.base for t in scores], name="base", meta={"series": 3})
    figure.add_bar(x=names, y=[t.compressed for t in scores], name="compressed", meta={"series": 0})
    figure.add_scatter(
        x=names, y=[t.chance for t in scores], name="chance", mode="markers",
        marker={"symbol": "line-ew-open", "size": 30}, meta={"ink": True},
    )  # fmt: skip
    kept = [(name, t.retention, t.ci95) for name, t in zip(names, scores, strict=True)]
    rows = [(name, value, ci95) for name, value, ci95 in kept if value is not None]
    figure.add_bar(
        x=[name for name, *_ in rows],
        y=[value for _, value, _ in rows],
        error_y=_spread([(value, ci95) for _, value, ci95 in rows]),
        name="retention", showlegend=False, meta={"series": 0}, width=0.4, xaxis="x2", yaxis="y2",
    )  # fmt: skip
    return _plain(figure)


def curve_points(recovery: RecoveryRecord) -> str:
    """Points "x,y" of the KL at each look at the held-out text, in a box of 600 x 160 whose 0 lies at 150."""
    steps = max(1, recovery.curve[-1].step)
    highest = max(point.kl for point in recovery.curve) or 1.0
    return " ".join(
        f"{600 * point.step / steps:.1f},{150 - 140 * point.kl / highest:.1f}"
        for point in recovery.curve
    )


def _plain(figure: go.Figure) -> dict[str, Any]:
    """JSON types only, without plotly's default theme: the page brings its own."""
    data: dict[str, Any] = json.loads(figure.to_json())  # what is not finite becomes null
    data["layout"].pop("template", None)
    return data
