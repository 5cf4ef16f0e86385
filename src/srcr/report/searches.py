"""What a search measured: its candidates in their order, against what was predicted, and their front."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from srcr.plans.specs import CompressionLevel
from srcr.records.search import Measurement, SearchSummary
from srcr.report.plots import Figure, axis, dominators

#: A group's levels by name, each with the loss that is predicted for it.
Levels = Mapping[str, tuple[CompressionLevel, float]]

KL = "measured KL, nats a token"


@dataclass(frozen=True)
class Candidate:
    """A candidate that compresses every group: its ``number`` in the search, its ``kl`` (of one that was
    given up, what it would have come to), what was ``predicted`` (the sum of what each group loses alone),
    and its theoretical ``size`` in percent of 16 bits."""

    number: int | None
    kl: float
    complete: bool
    predicted: float
    size: float

    @property
    def label(self) -> str:
        """What to call it."""
        return f"candidate {self.number}" if self.number else "candidate"


@dataclass(frozen=True)
class SearchHistory:
    """A search's ``name``, how many ``trials`` there were, the ``candidates`` among them that compress every
    group, and what it ``chose``."""

    name: str
    trials: int
    candidates: tuple[Candidate, ...]
    chosen: str

    @property
    def given_up(self) -> int:
        """How many candidates were not measured to the end."""
        return sum(not each.complete for each in self.candidates)

    def figures(self) -> dict[str, Figure | None]:
        """The plots by key; None for what the record does not say."""
        if not self.candidates:
            return {"history": None, "predicted": None, "front": None}
        return {"history": self._history(), "predicted": self._predicted(), "front": self._front()}

    def _history(self) -> Figure | None:
        """KL in the order of the search, and the best so far."""
        shown = sorted(
            (each for each in self.candidates if each.number), key=lambda each: each.number or 0
        )
        complete = [each for each in shown if each.complete]
        if not complete:
            return None
        best = {
            "type": "scatter", "mode": "lines", "name": "best so far", "hoverinfo": "skip",
            "line": {"shape": "hv"}, "meta": {"soft": True},
            "x": [each.number for each in complete],
            "y": list(accumulate((each.kl for each in complete), min)),
        }  # fmt: skip
        data = [*_points(shown, lambda each: float(each.number or 0)), best]
        return {
            "data": data,
            "layout": {"xaxis": axis("candidate, in the search's order"), "yaxis": axis(KL, log=True)},
        }  # fmt: skip

    def _predicted(self) -> Figure | None:
        """Measured against predicted KL; on the line both are equal."""
        shown = [each for each in self.candidates if each.predicted > 0]
        if not shown:
            return None
        values = [part for each in shown for part in (each.predicted, each.kl)]
        ends = [min(values), max(values)]
        equal = {
            "type": "scatter", "mode": "lines", "name": "equal", "hoverinfo": "skip",
            "meta": {"soft": True}, "x": ends, "y": ends,
        }  # fmt: skip
        data = [*_points(shown, lambda each: each.predicted), equal]
        return {
            "data": data,
            "layout": {
                "xaxis": axis("predicted KL, nats a token", log=True),
                "yaxis": axis(KL, log=True),
            },
        }

    def _front(self) -> Figure:
        """KL against size, with the Pareto front of what was measured to the end."""
        complete = [each for each in self.candidates if each.complete]
        above = dominators([(each.size, -each.kl) for each in complete])
        best = [each for each, others in zip(complete, above, strict=True) if not others]
        best.sort(key=lambda each: each.size)
        front = {
            "type": "scatter", "mode": "lines+markers", "name": "Pareto front", "hoverinfo": "skip",
            "meta": {"soft": True}, "x": [each.size for each in best], "y": [each.kl for each in best],
        }  # fmt: skip
        title = "theoretical size: 1 − TCr, % of 16-bit"
        data = [*_points(self.candidates, lambda each: each.size), front]
        return {"data": data, "layout": {"xaxis": axis(title), "yaxis": axis(KL, log=True)}}


def _points(
    candidates: Sequence[Candidate], x: Callable[[Candidate], float]
) -> list[dict[str, Any]]:
    """Traces of what was measured to the end, and of what was given up."""
    traces = []
    for name, series, complete in (("measured", 0, True), ("given up early", 3, False)):
        shown = [each for each in candidates if each.complete is complete]
        if shown:
            traces.append({
                "type": "scatter", "mode": "markers", "name": name, "meta": {"series": series,
                "labels": [each.label for each in shown]},
                "x": [_short(x(each)) for each in shown],
                "y": [_short(each.kl) for each in shown],
                "text": [
                    f"{each.label}<br>KL {each.kl:.4g}, predicted {each.predicted:.4g}"
                    f"<br>TCr {100 - each.size:.4g} %" for each in shown
                ],
                "hovertemplate": "%{text}<extra></extra>",
            })  # fmt: skip
    return traces


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def search_history(name: str, search: SearchSummary) -> SearchHistory:
    """What a ``search.json`` says of the candidates."""
    table = search.sensitivity
    levels = (
        [{str(level): (level, loss) for level, loss in known} for known in table.predicted()]
        if table
        else []
    )
    sizes = [group.size for group in table.groups] if table else []
    read = (_candidate(each, levels, sizes) for each in search.measured)
    candidates = tuple(each for each in read if each is not None)
    return SearchHistory(name, len(search.measured), candidates, search.chosen)


def _candidate(
    measured: Measurement, levels: Sequence[Levels], sizes: Sequence[int]
) -> Candidate | None:
    """The candidate; None where it leaves a group as it is, or the table does not know its levels."""
    if not 0 < measured.kl < math.inf or not 0 < len(measured.levels) == len(levels):
        return None
    predicted = bits = 0.0
    for known, size, name in zip(levels, sizes, measured.levels, strict=True):
        if name is None or name not in known:
            return None
        level, loss = known[name]
        predicted += loss
        bits += size * (1 - level.sparsity) * level.num_bits
    share = 100 * bits / (16 * max(1, sum(sizes)))
    return Candidate(measured.number, measured.kl, measured.complete, predicted, share)
