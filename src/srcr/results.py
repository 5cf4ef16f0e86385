"""What ``srcr evaluate`` found, as JSON, and where it is written."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srcr.card import with_evaluation
from srcr.errors import InputError
from srcr.files import CARD, EVALUATION, RECORD, REPORT, check_new_file, write_text
from srcr.metrics import retention
from srcr.metrics.divergence import Divergence
from srcr.metrics.retention import PairedScores
from srcr.types import Estimate, Rates


@dataclass(frozen=True, eq=False)
class Scored:
    """One task, both models."""

    metric: str
    scores: PairedScores


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "ci95": [estimate.low, estimate.high]}


def divergence_json(divergence: Divergence) -> dict[str, Any]:
    percentiles = zip(("p50", "p95", "p99", "p999"), divergence.kl_percentiles, strict=True)
    return {
        "kl": _estimate(divergence.kl) | dict(percentiles),
        "top1_agreement": _estimate(divergence.top1_agreement),
        "flips": _estimate(divergence.flips),
        "perplexity": {
            "base": divergence.base_perplexity,
            "compressed": divergence.perplexity,
            "ratio": _estimate(divergence.perplexity_ratio),
        },
        "n_tokens": divergence.n_tokens,
    }


def retention_json(scored: Mapping[str, Scored], rates: Rates) -> dict[str, Any]:
    """``tasks``, ``sr``, ``srcr`` with their intervals, and ``items``, the scores behind them."""
    pairs = {name: part.scores for name, part in scored.items()}
    sr = retention.semantic_retention(pairs)
    both = None if sr is None else retention.srcr(sr, rates.sparsity, rates.bits)
    return {
        "tasks": {name: _task_json(part) for name, part in scored.items()},
        "sr": sr and sr.value,
        "sr_ci95": sr and [sr.low, sr.high],
        "srcr": both and both.value,
        "srcr_ci95": both and [both.low, both.high],
        "items": {
            name: {"base": _plain(part.base), "compressed": _plain(part.compressed)}
            for name, part in pairs.items()
        },
    }


def _task_json(scored: Scored) -> dict[str, Any]:
    scores = scored.scores
    kept = retention.task_retention(scores)
    found = {
        "base": float(scores.base.mean()),
        "compressed": float(scores.compressed.mean()),
        "chance": scores.chance,
        "retention": kept and kept.value,
        "ci95": kept and [kept.low, kept.high],
        "p_value": retention.mcnemar(scores.base, scores.compressed),
        "flips": retention.flips(scores),
        "n": len(scores.base),
        "metric": scored.metric,
    }
    if kept is None:
        found["note"] = (
            "the base is at chance here: retention is undefined, and the task is not in Sr"
        )
    return found


def _plain(scores: Any) -> list[float]:
    """Scores as short JSON numbers."""
    return [int(score) if score in (0, 1) else float(score) for score in scores]


def check_results(out: Path | None, folders: Sequence[str | Path], overwrite: bool) -> None:
    """Refuse, before any work, to write over anything: ``out``, and in each of ``folders`` the evaluation
    and the report.

    Raises:
        InputError: names the path and the remedy.
    """
    if out is not None:
        check_new_file(out, overwrite)
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise InputError(
                f"--report writes into the compressed folder, and {folder} is none here: use -o FILE, and "
                "'srcr report FILE'"
            )
        if not os.access(folder, os.W_OK):
            raise InputError(
                f"--report cannot write into {folder}: use -o FILE, and 'srcr report FILE'"
            )
        for name in (EVALUATION, REPORT):
            if (folder / name).exists() and not overwrite:
                raise InputError(
                    f"{folder / name} exists from an earlier evaluation: use --overwrite to replace it "
                    "with what is measured now, which may be less"
                )


def write_results(reports: Sequence[dict[str, Any]], out: Path | None, into_folders: bool) -> None:
    """Write the JSON to ``out`` (one object, or a list); with ``into_folders`` also ``evaluation.json``,
    ``report.html`` and the model card's figures in each compressed folder."""
    if out is not None:
        data = reports[0] if len(reports) == 1 else list(reports)
        write_text(out, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    if not into_folders:
        return
    from srcr.report import write_report

    for found in reports:
        text = json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False)
        write_text(Path(found["compressed"]) / EVALUATION, text + "\n")
    for found in reports:
        folder = Path(found["compressed"])
        if (folder / RECORD).is_file() and (folder / CARD).is_file():
            card = (folder / CARD).read_text(encoding="utf-8")
            write_text(folder / CARD, with_evaluation(card, found))
        write_report([folder], folder / REPORT, overwrite=True)
