"""The picture of `real.py table`: KL against TCr and against stored bytes, as SVG, a row of two a model."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT, MARGIN, TOP, GAP = 400, 300, 60, 40, 40
LEGEND = 200
COLOURS = {
    "bits alone": "#d62728",
    "joint": "#1f77b4",
    "sequential A": "#17becf",
    "sequential B": "#9edae5",
    "searched": "#2ca02c",
    "llm-compressor": "#ff7f0e",
    "llm-compressor, joint": "#bc5f00",
    "AutoRound": "#9467bd",
    "GPTQModel": "#7f7f7f",
}
#: Their points are joined by a line.
JOINED = ("bits alone", "searched")
#: Their points say what they are, where there is room.
NAMED = ("bits alone", "joint")


@dataclass(frozen=True)
class Dot:
    """A candidate: its series, what it is, and its figures (`stored` in MB; None where that says nothing)."""

    series: str
    label: str
    tcr: float
    stored: float | None
    kl: float
    interval: tuple[float, ...]


@dataclass(frozen=True)
class Axes:
    """Where a panel lies, and what of x and log10 KL it shows."""

    left: float
    top: float
    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, kl: float) -> tuple[float, float]:
        """The point on the page."""
        right = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (math.log10(kl) - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + right * WIDTH, self.top + (1 - up) * HEIGHT


def text(x: float, y: float, words: str, anchor: str = "middle", size: int = 11) -> str:
    """A label."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(words)}</text>'


def line(
    start: tuple[float, float], end: tuple[float, float], colour: str, width: float = 1
) -> str:
    """A stroke."""
    (x1, y1), (x2, y2) = start, end
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-width="{width}"/>'
    )


def frame(axes: Axes, ticks: Sequence[float], unit: Callable[[float], str], name: str) -> list[str]:
    """Grid, ticks and names of the axes."""
    left, bottom = axes.left, axes.top + HEIGHT
    marks = []
    for exponent in range(math.floor(axes.y[0]), math.ceil(axes.y[1]) + 1):
        for step in (1, 2, 5):
            value = step * 10**exponent
            if axes.y[0] <= math.log10(value) <= axes.y[1]:
                _, y = axes.at(axes.x[0], value)
                marks.append(line((left, y), (left + WIDTH, y), "#e5e5e5"))
                marks.append(text(left - 6, y + 4, f"{value:g}", "end"))
    for tick in ticks:
        x, _ = axes.at(tick, 10 ** axes.y[0])
        marks += [line((x, bottom), (x, bottom + 4), "#333"), text(x, bottom + 17, unit(tick))]
    marks.append(line((left, bottom), (left + WIDTH, bottom), "#333"))
    marks.append(line((left, axes.top), (left, bottom), "#333"))
    marks.append(text(left + WIDTH / 2, bottom + 34, name))
    return marks


def points(axes: Axes, dots: Sequence[tuple[float, Dot]]) -> list[str]:
    """Candidates with the intervals of their KL; a pointer over one shows what it is."""
    marks = []
    for series in JOINED:
        path = sorted((x, dot.kl) for x, dot in dots if dot.series == series)
        for start, end in pairwise(path):
            marks.append(line(axes.at(*start), axes.at(*end), COLOURS[series], 1.5))
    for x, dot in dots:
        colour = COLOURS[dot.series]
        cx, cy = axes.at(x, dot.kl)
        low, high = (axes.at(x, max(end, 10 ** axes.y[0]))[1] for end in dot.interval)
        marks.append(line((cx, low), (cx, high), colour))
        title = escape(f"{dot.series}: {dot.label}, KL {dot.kl:.4f}")
        marks.append(
            f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="4" fill="{colour}"><title>{title}</title></circle>'
        )
    return marks


def by_tcr(dots: Sequence[Dot], top: float, y: tuple[float, float]) -> list[str]:
    """KL against TCr; series stand beside each other at one rate."""
    axes = Axes(MARGIN, top, (0.72, 0.905), y)
    names = [series for series in COLOURS if any(dot.series == series for dot in dots)]
    shift = {name: 0.005 * (i - (len(names) - 1) / 2) for i, name in enumerate(names)}
    placed = [(dot.tcr + shift[dot.series], dot) for dot in dots]
    ticks = sorted({dot.tcr for dot in dots})
    return [
        *frame(axes, ticks, lambda t: f"{100 * t:.2f} %", "TCr"),
        *points(axes, placed),
        text(MARGIN, top - 8, "KL to the base, nats a token (log scale)", "start"),
    ]


def by_bytes(dots: Sequence[Dot], top: float, y: tuple[float, float]) -> list[str]:
    """KL against stored bytes, of what srcr packed."""
    placed = [(dot.stored, dot) for dot in dots if dot.stored is not None]
    if not placed:
        return []
    low, high = min(x for x, _ in placed), max(x for x, _ in placed)
    room = max(0.06 * (high - low), 1)
    axes = Axes(MARGIN + WIDTH + GAP + MARGIN, top, (low - room, high + room), y)
    ticks = [low + i * (high - low) / 4 for i in range(5)] if high > low else [low]
    names = []
    for x, dot in placed:
        if dot.series in NAMED:
            right, middle = axes.at(x, dot.kl)
            names.append(text(right + 7, middle + 3, dot.label, "start", 9))
    marks = frame(axes, ticks, lambda t: f"{t:.0f}", "weight files on disk, MB")
    return marks + points(axes, placed) + names


def picture(models: Mapping[str, Sequence[Dot]]) -> str:
    """The whole SVG."""
    panel = TOP + HEIGHT + 60
    marks, used = [], []
    for number, (name, dots) in enumerate(models.items()):
        top = TOP + 20 + number * panel
        ends = [end for dot in dots for end in (dot.kl, *dot.interval) if end > 0]
        y = (math.log10(min(ends)) - 0.08, math.log10(max(ends)) + 0.08)
        marks.append(text(MARGIN, top - 26, name, "start", 15))
        marks += by_tcr(dots, top, y) + by_bytes(dots, top, y)
        used += [dot.series for dot in dots]
    left = 2 * (MARGIN + WIDTH) + GAP + 20
    for row, series in enumerate(series for series in COLOURS if series in used):
        y_at = TOP + 30 + 20 * row
        marks.append(f'<circle cx="{left}" cy="{y_at - 4}" r="5" fill="{COLOURS[series]}"/>')
        marks.append(text(left + 12, y_at, series, "start", 12))
    width, height = left + LEGEND, len(models) * panel + 20
    body = "\n".join(marks)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif">\n<rect width="100%" height="100%" fill="white"/>\n'
        f"{body}\n</svg>\n"
    )
