"""The README's picture, of the figures in benchmarks/results/smollm2_llama_cpp.json, as SVG.

``python scripts/plot_readme.py`` writes docs/images/bytes.svg, which is light or dark as its reader is.
"""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "benchmarks/results/smollm2_llama_cpp.json"
PICTURE = ROOT / "docs/images/bytes.svg"

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 730, 64, 340
MEGABYTES, KL = (88.0, 119.0), (0.015, 0.3)
X_TICKS, Y_TICKS = (90, 95, 100, 105, 110, 115), (0.02, 0.05, 0.1, 0.2)
STYLE = """
text{font:13px system-ui,sans-serif;fill:#333}.big{font-size:15px;font-weight:600}.grid{stroke:#e3e3e3}
.page{fill:#fff}.srcr{stroke:#1666c5;fill:#1666c5}.peer{stroke:#b5540a;fill:#b5540a}
polyline{fill:none!important;stroke-width:2}text.srcr,text.peer{stroke:none}
@media(prefers-color-scheme:dark){text{fill:#ddd}.grid{stroke:#3a3f46}.page{fill:#0d1117}
.srcr{stroke:#6cb0ff;fill:#6cb0ff}.peer{stroke:#f0a05a;fill:#f0a05a}}
"""


def x_of(megabytes: float) -> float:
    """Where a size lies from the left."""
    return LEFT + (megabytes - MEGABYTES[0]) / (MEGABYTES[1] - MEGABYTES[0]) * (RIGHT - LEFT)


def y_of(kl: float) -> float:
    """Where a KL lies from the top, by its logarithm."""
    low, high = map(math.log, KL)
    return BOTTOM - (math.log(kl) - low) / (high - low) * (BOTTOM - TOP)


def words(x: float, y: float, text: str, style: str = "", anchor: str = "middle") -> str:
    """A label."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="{anchor}">{escape(text)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'


def frame() -> list[str]:
    """The page, its axes and what they show."""
    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" class="page"/>']
    for tick in Y_TICKS:
        parts.append(line(LEFT, y_of(tick), RIGHT, y_of(tick), "grid"))
        parts.append(words(LEFT - 8, y_of(tick) + 4, f"{tick:g}", anchor="end"))
    for tick in X_TICKS:
        parts.append(line(x_of(tick), TOP, x_of(tick), BOTTOM, "grid"))
        parts.append(words(x_of(tick), BOTTOM + 20, f"{tick}"))
    title = "SmolLM2-135M in llama.cpp: what is lost at which file size (lower is better)"
    parts.append(words(LEFT - 40, 26, title, "big", "start"))
    parts.append(words(LEFT - 40, 48, "KL to the original, nats a token", anchor="start"))
    parts.append(words((LEFT + RIGHT) / 2, BOTTOM + 44, "file, MB (the original: 269)"))
    return parts


def series(files: Sequence[Mapping[str, Any]], style: str, below: bool) -> list[str]:
    """The files of a tool: points with their errors and names, joined by a line."""
    points = [(x_of(file["megabytes"]), y_of(file["kl"])) for file in files]
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts = [f'<polyline points="{joined}" class="{style}"/>']
    for file, (x, y) in zip(files, points, strict=True):
        kl, error = file["kl"], file["error"]
        parts.append(line(x, y_of(kl - error), x, y_of(kl + error), style))
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" class="{style}"/>')
        name = f"{file['by']}, {file['name']}"
        anchor = "end" if below else "start"
        parts.append(
            words(x - 10 if below else x + 10, y + (18 if below else -9), name, style, anchor)
        )
    return parts


def picture(files: Sequence[Mapping[str, Any]]) -> str:
    """The picture of all files."""
    ours = [file for file in files if file["by"] == "srcr"]
    theirs = [file for file in files if file["by"] != "srcr"]
    parts = [*frame(), *series(theirs, "peer", False), *series(ours, "srcr", True)]
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
    return "\n".join([opening, f"<style>{STYLE}</style>", *parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(picture(json.loads(FIGURES.read_text())["files"]), encoding="utf-8")
