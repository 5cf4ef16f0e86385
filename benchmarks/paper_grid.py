"""The grid of arXiv 2505.07289 on one model: at TCr 75, 81.25 and 87.5 %, is joint better than bits alone?

    python benchmarks/paper_grid.py MODEL -o build/grid [--tasks bundled] [--calibration self]

Every (sparsity, bits) on the three lines, unstructured, and as 2:4 and 6:8 where they lie on a line; both
halves at once in one pass (joint) and in the paper's sequences (Case A, Case B). One symmetric scale a row
for all, so that TCr compares like with like. What is finished is kept in the folder, and the same command
continues. It ends in Markdown tables, the report and one sentence on the question.
"""

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import torch

import srcr
from srcr.errors import InputError
from srcr.metrics.retention import PairedScores, sr_difference
from srcr.models.checkpoint import open_model
from srcr.serialize import to_json
from srcr.storage.files import write_text

LINES = (0.75, 0.8125, 0.875)
WIDTHS = (2, 3, 4, 5, 6, 7, 8, 16)
MODES = ("joint", "sequential-a", "sequential-b")
#: Candidates that share one pass of the base.
TOGETHER = 16


@dataclass(frozen=True)
class Point:
    """One configuration on a line of constant TCr."""

    tcr: float
    sparsity: float
    bits: int
    structure: str
    mode: str

    @property
    def name(self) -> str:
        """Its folder."""
        share = f"{100 * self.sparsity:.4g}".replace(".", "_")
        return f"s{share}-q{self.bits}-{self.structure.replace(':', 'of')}-{self.mode}"

    @property
    def label(self) -> str:
        """For tables."""
        pruned = f"{100 * self.sparsity:.1f} %" if self.sparsity else ""
        bits = f"{self.bits} bits" if self.bits < 16 else ""
        shape = f" {self.structure}" if self.structure != "unstructured" else ""
        return " + ".join(part for part in (f"{pruned}{shape}".strip(), bits) if part)


def grid(widths: set[int]) -> list[Point]:
    """Every point of the three lines; patterns that do not divide a width are skipped, and said."""
    points = []
    for tcr in LINES:
        for bits in WIDTHS:
            sparsity = 1 - 16 * (1 - tcr) / bits
            if sparsity < -1e-9 or sparsity >= 1:
                continue
            sparsity = max(0.0, round(sparsity, 12))
            shapes = ["unstructured"]
            for structure, m, share in (("2:4", 4, 0.5), ("6:8", 8, 0.25)):
                if abs(sparsity - share) < 1e-9:
                    if any(width % m for width in widths):
                        print(f"skipped: {structure} with {bits} bits, {m} divides not every width")
                    else:
                        shapes.append(structure)
            modes = MODES if sparsity and bits < 16 else MODES[:1]
            points += [Point(tcr, sparsity, bits, s, mode) for s in shapes for mode in modes]
    return points


def recipe(point: Point) -> srcr.Recipe:
    """How srcr is told."""
    prune = None
    if point.sparsity:
        prune = srcr.PruneSpec(sparsity=point.sparsity, mask_structure=point.structure)
    quant = srcr.QuantSpec(num_bits=point.bits, group_size=-1) if point.bits < 16 else None
    return srcr.Recipe(prune, quant, srcr.SolverSpec(mode=point.mode))  # type: ignore[arg-type]


def check_settings(options: argparse.Namespace) -> None:
    """Only runs with the same settings may share a folder."""
    mine = {
        key: str(value) for key, value in vars(options).items() if key not in ("out", "threads")
    }
    path = options.out / "settings.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != mine:
        raise SystemExit(
            f"{options.out} holds runs with other settings ({path}): choose another -o"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(mine, indent=2) + "\n")


def run(options: argparse.Namespace, points: list[Point]) -> dict[Point, dict[str, Any]]:
    """Compress and evaluate what is not there yet."""
    calibration = srcr.Calibration(options.calibration, options.samples, options.seq_len)
    text = srcr.EvaluationText(options.text, options.eval_samples, options.seq_len)
    tasks = srcr.TaskSpec(tuple(options.tasks.split(",")), options.limit) if options.tasks else None
    semantic = srcr.SemanticSpec(n=options.prompts) if options.prompts else None
    quiet = srcr.RunOptions(quiet=True)

    def result(point: Point) -> Path:
        return Path(options.out / point.name / "evaluation.json")

    waiting = [point for point in points if not result(point).exists()]
    for start in range(0, len(waiting), TOGETHER):
        batch = waiting[start : start + TOGETHER]
        folders = [options.out / point.name for point in batch]
        for point, folder in zip(batch, folders, strict=True):
            if not (folder / "srcr.json").exists():
                out = srcr.Output(folder, overwrite=True)  # what a killed run left half-written
                srcr.compress(options.model, out, recipe(point), calibration, quiet)
                print(f"compressed {point.name}", flush=True)
        evaluations = srcr.evaluate(options.model, folders, text, tasks, semantic, quiet)
        for point, evaluation in zip(batch, evaluations, strict=True):
            write_text(result(point), to_json(evaluation))
        print(f"measured {start + len(batch)} of {len(waiting)}", flush=True)
    return {p: json.loads(result(p).read_text(encoding="utf-8")) for p in points}


def markdown(results: dict[Point, dict[str, Any]], tcr: float) -> str:
    """The table of one line, best first."""
    rows = [(p, e) for p, e in results.items() if p.tcr == tcr]
    rows.sort(key=lambda row: row[1]["divergence"]["kl"]["value"])
    names = list(rows[0][1]["tasks"])
    head = ["configuration", "mode", "KL [95 %]", "same top-1", "stored MB", "entropy bits"]
    head += [*names, "Sr [95 %]", "SrCr"] if names else []
    head += ["semantic [95 %]"] if rows[0][1]["semantic"] else []
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for point, e in rows:
        divergence, rates = e["divergence"], e["rates"]
        kl = divergence["kl"]
        both = point.sparsity > 0 and point.bits < 16
        cells = [
            point.label,
            point.mode if both else "",
            f"{kl['value']:.4f} [{kl['ci95'][0]:.4f}, {kl['ci95'][1]:.4f}]",
            f"{100 * divergence['top1_agreement']['value']:.1f} %",
            f"{rates['stored_bytes'] / 1e6:.2f}",
            f"{rates['entropy_bits']:.2f}",
        ]
        if names:
            cells += [f"{e['tasks'][name]['compressed']:.3f}" for name in names]
            cells += [
                _spread(e["sr"], e["sr_ci95"]),
                "" if e["srcr"] is None else f"{e['srcr']:.3f}",
            ]
        if e["semantic"]:
            cells.append(_spread(e["semantic"]["normalised"], e["semantic"]["normalised_ci95"]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(value: float | None, ci95: list[float] | None) -> str:
    if value is None or ci95 is None:
        return "undefined"
    return f"{value:.3f} [{ci95[0]:.3f}, {ci95[1]:.3f}]"


def scores(evaluation: dict[str, Any]) -> dict[str, PairedScores]:
    """The items of an evaluation, for a paired comparison of two candidates."""
    return {
        name: PairedScores(
            np.array(items["base"], dtype=float),
            np.array(items["compressed"], dtype=float),
            evaluation["tasks"][name]["chance"],
        )
        for name, items in evaluation["items"].items()
    }


def verdict(results: dict[Point, dict[str, Any]], tcr: float) -> str:
    """One sentence: the joint configuration with the smallest KL against bits alone, at one rate."""
    rows = {p: e for p, e in results.items() if p.tcr == tcr}
    alone, bits = next((p, e) for p, e in rows.items() if not p.sparsity)
    both = {p: e for p, e in rows.items() if p.sparsity and p.bits < 16 and p.mode == "joint"}
    best = min(both, key=lambda point: float(both[point]["divergence"]["kl"]["value"]))
    ours, theirs = both[best]["divergence"]["kl"], bits["divergence"]["kl"]
    ratio = ours["value"] / theirs["value"]
    text = (
        f"At TCr {100 * tcr:.2f} %, joint {'beats' if ratio < 1 else 'does not beat'} bits alone in KL: "
        f"{best.label} has {ratio:.2f} times that of {alone.label} ({ours['value']:.4f} "
        f"[{ours['ci95'][0]:.4f}, {ours['ci95'][1]:.4f}] against {theirs['value']:.4f} "
        f"[{theirs['ci95'][0]:.4f}, {theirs['ci95'][1]:.4f}])"
    )
    if both[best]["sr"] is not None:
        difference = sr_difference(scores(both[best]), scores(bits))
        assert difference is not None
        word = (
            "more" if difference.low > 0 else "less" if difference.high < 0 else "not clearly more"
        )
        text += (
            f"; it keeps {word}: Sr {both[best]['sr']:.3f} against {bits['sr']:.3f}, paired difference "
            f"{difference.value:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"
        )
    return text + "."


def main() -> None:
    """Run the grid, print the tables, write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--calibration", default="self")
    parser.add_argument("--text", default="self")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--eval-samples", type=int, default=96)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--tasks", help="as srcr evaluate --tasks")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--prompts", type=int, default=0, help="prompts for semantic consistency")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    check_settings(options)
    shapes = open_model(options.model).topology.shapes.values()
    points = grid({width for _, width in shapes})
    results = run(options, points)
    lines = [f"# The paper's grid on {Path(options.model).name}\n"]
    for tcr in LINES:
        lines += [
            f"## TCr {100 * tcr:.2f} %\n",
            markdown(results, tcr),
            "",
            verdict(results, tcr),
            "",
        ]
    (options.out / "tables.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))
    try:
        srcr.write_report([options.out / p.name for p in points], options.out / "report.html", True)
    except InputError as error:
        raise SystemExit(f"no report: {error}") from None
    print(f"report: {options.out / 'report.html'}")


if __name__ == "__main__":
    main()
