"""The page that `real.py table` writes: what was measured, the answer to the question, ratios to peers."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peers import PEERS
from real_plot import Dot, picture
from real_steps import TITLES, Step, plan
from srcr.metrics.retention import PairedScores, compression, semantic_retention, sr_difference

#: "Keeps 20 % more" of arXiv 2505.07289.
CLAIM = 1.2
HEAD = (
    "configuration", "by", "TCr", "stored MB", "KL [95 %]", "perplexity", "same top-1", "BLiMP", "BBH",
    "Sr [95 %]", "SrCr", "meaning", "s", "CPU s", "peak MB",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A measured step."""

    step: Step
    record: dict[str, Any]

    @property
    def evaluation(self) -> dict[str, Any]:
        """What `srcr evaluate` found."""
        result: dict[str, Any] = self.record["evaluation"]
        return result

    @property
    def kl(self) -> float:
        """Mean KL to the base."""
        return float(self.evaluation["divergence"]["kl"]["value"])

    @property
    def rates(self) -> dict[str, float] | None:
        """srcr's own rates; None of a peer, whose checkpoints are dense."""
        return None if self.step.side in PEERS else self.evaluation["rates"]

    @property
    def label(self) -> str:
        """For tables; of a search with what it chose."""
        if self.step.target is None:
            return self.step.label
        rates = self.evaluation["rates"]
        return f"searched ({100 * rates['sparsity']:.1f} % + {rates['bits']:.2f} bits)"

    def scores(self, prefix: str = "") -> dict[str, PairedScores]:
        """Items of the tasks whose name begins so."""
        return {
            name: PairedScores(
                np.array(items["base"], dtype=float),
                np.array(items["compressed"], dtype=float),
                self.evaluation["tasks"][name]["chance"],
            )
            for name, items in self.evaluation["items"].items()
            if name.startswith(prefix)
        }

    def retention(self, prefix: str = "") -> float | None:
        """Mean retention over those tasks."""
        kept = semantic_retention(self.scores(prefix))
        return None if kept is None else kept.value

    @property
    def srcr(self) -> float | None:
        """SrCr, of the rates that were asked for where a peer made it."""
        sr, rates = self.retention(), self.rates
        if sr is None:
            return None
        s, q = (rates["sparsity"], rates["bits"]) if rates else (self.step.sparsity, self.step.bits)
        return min(1.0, sr) * compression(s, q)

    @property
    def meaning(self) -> float | None:
        """Normalised semantic consistency."""
        semantic = self.evaluation["semantic"]
        return semantic["normalised"] if semantic else None


def read(folder: Path, suffix: str) -> list[Row]:
    """All measured steps of one instruction set, as planned."""
    rows = []
    for step in plan(list(PEERS)):
        path = folder / f"{step.name}{suffix}.json"
        if path.exists():
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["evaluation"]:
                rows.append(Row(step, record))
    return rows


def number(value: float | None, digits: int = 3) -> str:
    """A cell."""
    return "" if value is None else f"{value:.{digits}f}"


def lines(head: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    rule = "|" + "---|" * len(head)
    return [f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in cells)]


def cells(row: Row) -> list[str]:
    """A row of the main table."""
    evaluation, divergence = row.evaluation, row.evaluation["divergence"]
    kl, rates = divergence["kl"], row.rates
    sr = evaluation["sr"]
    interval = f" [{evaluation['sr_ci95'][0]:.3f}, {evaluation['sr_ci95'][1]:.3f}]" if sr else ""
    return [
        row.label,
        TITLES[row.step.side],
        f"{100 * (rates['tcr'] if rates else row.step.tcr):.2f} %",
        f"{rates['stored_bytes'] / 1e6:.1f}" if rates else "dense",
        f"{kl['value']:.4f} [{kl['ci95'][0]:.4f}, {kl['ci95'][1]:.4f}]",
        number(divergence["perplexity"]["compressed"], 2),
        f"{100 * divergence['top1_agreement']['value']:.1f} %",
        number(row.retention("blimp")),
        number(row.retention("bbh_")),
        number(sr) + interval,
        number(row.srcr),
        number(row.meaning),
        f"{row.record['seconds']:.0f}",
        f"{row.record['cpu_seconds']:.0f}",
        f"{row.record['peak_bytes'] / 1e6:.0f}",
    ]


def ratios(rows: Sequence[Row]) -> list[str]:
    """srcr over each peer at the same sparsity and bits."""
    ours = {
        (r.step.sparsity, r.step.bits): r
        for r in rows
        if r.step.side == "srcr" and r.step.mode == "joint"
    }
    body = []
    for row in rows:
        mine = ours.get((row.step.sparsity, row.step.bits))
        if row.step.side not in PEERS or mine is None:
            continue
        parts = [mine.kl / row.kl]
        parts += [mine.record[k] / row.record[k] for k in ("seconds", "cpu_seconds", "peak_bytes")]
        body.append([row.label, TITLES[row.step.side], *(number(part) for part in parts)])
    if not body:
        return []
    head = ["configuration", "srcr over", "KL", "wall time", "CPU time", "peak memory"]
    return ["### srcr over its peers", "", *lines(head, body), ""]


#: Measures of which more is better.
KEPT: Mapping[str, Callable[[Row], float | None]] = {
    "Sr": lambda row: row.retention(),
    "BLiMP": lambda row: row.retention("blimp"),
    "BBH": lambda row: row.retention("bbh_"),
    "SrCr": lambda row: row.srcr,
    "meaning": lambda row: row.meaning,
}


def over(row: Row, alone: Row, measure: str) -> float | None:
    """A measure of one candidate over that of another."""
    left, right = KEPT[measure](row), KEPT[measure](alone)
    return None if left is None or not right else left / right


def answer(rows: Sequence[Row]) -> list[str]:
    """Joint against bits alone at equal TCr: a table, and a sentence a rate."""
    body, said = [], []
    for tcr in sorted({r.step.tcr for r in rows}):
        mine = [r for r in rows if abs(r.step.tcr - tcr) < 1e-9 and r.step.side not in PEERS]
        alone = next((r for r in mine if r.step.sparsity == 0 and r.step.target is None), None)
        both = sorted((r for r in mine if r is not alone), key=lambda r: r.kl)
        if alone is None or not both:
            continue
        for row in both:
            difference = sr_difference(row.scores(), alone.scores())
            ends = "" if difference is None else (
                f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
            )  # fmt: skip
            parts = [number(row.kl / alone.kl), *(number(over(row, alone, m)) for m in KEPT)]
            body.append([row.label, alone.label, f"{100 * tcr:.2f} %", *parts, ends])
        said.append(sentence(both[0], alone, tcr))
    if not body:
        return []
    head = ["configuration", "over", "TCr", "KL", *KEPT, "Sr, paired difference [95 %]"]
    question = "### At equal TCr, does joint keep 20 % more than bits alone?"
    return [question, "", *said, "", *lines(head, body), ""]


def sentence(best: Row, alone: Row, tcr: float) -> str:
    """What the numbers say at one rate, of the configuration with the smallest KL."""
    ratio = best.kl / alone.kl
    text = (
        f"- **TCr {100 * tcr:.2f} %**: {best.label} has {ratio:.2f} times the KL of {alone.label}"
    )
    pairs = {measure: over(best, alone, measure) for measure in KEPT}
    known = {measure: value for measure, value in pairs.items() if value is not None}
    enough = [f"{m} ({100 * (v - 1):+.0f} %)" for m, v in known.items() if v >= CLAIM]
    short = [f"{m} ({100 * (v - 1):+.0f} %)" for m, v in known.items() if v < CLAIM]
    text += f"; 20 % more in {', '.join(enough) or 'no measure of what is kept'}"
    text += f", not in {', '.join(short)}" if short else ""
    difference = sr_difference(best.scores(), alone.scores())
    if difference is not None and difference.low <= 0 <= difference.high:
        text += "; the paired interval of the difference in Sr includes 0"
    return text + "."


def heading(folder: Path, suffix: str, rows: Sequence[Row]) -> list[str]:
    """Model, machine, data and the tasks that were left out."""
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    base = json.loads((folder / f"base{suffix}.json").read_text(encoding="utf-8"))
    machine = rows[0].record["machine"]
    tasks = base["tasks"]
    out = [n for n, t in tasks.items() if not t["above_chance"]]
    kept = [f"{n} {t['base']:.3f} ({t['n']})" for n, t in tasks.items() if n not in out]
    perplexity = rows[0].evaluation["divergence"]["perplexity"]["base"]
    chosen = (
        "the model's own text" if settings["calibration"] == "self" else "WikiText-2, validation"
    )
    text = [
        f"## {Path(settings['model']).name}{suffix.replace('.', ', ')}",
        "",
        f"{machine['cpu']}, {machine['threads']} threads, {', '.join(machine['flags'])}"
        + (f", kept to {machine['isa']}" if suffix else "")
        + f". Calibration: {settings['samples']} x {settings['seq_len']} tokens of {chosen}; KL and "
        f"perplexity (base {perplexity:.2f}) on {settings['eval_samples']} x {settings['seq_len']} of "
        f"WikiText-2, test. Accuracy of the base (items): {', '.join(kept) or 'no task above chance'}.",
    ]
    if out:
        text[-1] += f" Not above chance, and left out: {', '.join(out)}."
    return [*text, ""]


INTRODUCTION = """# Real models

`python benchmarks/real.py run MODEL -o RESULTS --peers PEERS`, then `python benchmarks/real.py table
RESULTS` writes this page. One symmetric scale an output row everywhere, the same calibration tokens for all.
BLiMP, BBH and Sr are retention (1: all that the base has above chance), "meaning" is normalised semantic
consistency, see [measures](measures.md). Tasks are small (`benchmarks/real_data.py`): read the intervals.
Peers write dense checkpoints, so that their stored bytes say nothing. Time and memory are those of the
whole process, from outside.
"""


def write_page(folders: Sequence[Path], out: Path) -> None:
    """Write the page and its picture."""
    page, dots = [INTRODUCTION], {}
    for folder in folders:
        for base in sorted(folder.glob("base*.json")):
            suffix = base.stem.removeprefix("base")
            rows = read(folder, suffix)
            if not rows:
                continue
            head = heading(folder, suffix, rows)
            rows.sort(key=lambda row: (row.step.tcr, row.kl))
            page += [*head, *lines(HEAD, [cells(row) for row in rows]), ""]
            page += [*answer(rows), *ratios(rows)]
            dots[head[0].removeprefix("## ")] = [dot(row) for row in rows]
    if not dots:
        raise SystemExit("nothing is measured yet")
    images = out.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    (images / "real_models.svg").write_text(picture(dots), encoding="utf-8")
    page.insert(1, "![KL against TCr and against stored bytes](images/real_models.svg)\n")
    out.write_text("\n".join(page), encoding="utf-8")
    print(f"{out}: {sum(map(len, dots.values()))} candidates")


def dot(row: Row) -> Dot:
    """A row in the picture."""
    step, rates = row.step, row.rates
    if step.target is not None:
        series = "searched"
    elif step.side in PEERS:
        series = TITLES[step.side] + (", joint" if step.sparsity else "")
    elif not step.sparsity:
        series = "bits alone"
    else:
        series = "joint" if step.mode == "joint" else f"sequential {step.mode[-1].upper()}"
    kl = row.evaluation["divergence"]["kl"]
    stored = rates["stored_bytes"] / 1e6 if rates else None
    return Dot(series, step.label, step.tcr, stored, kl["value"], tuple(kl["ci95"]))
