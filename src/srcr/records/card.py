"""The model card: what was done, how much smaller the model is, and how to load it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yaml import YAMLError

from srcr.environment import format_bytes
from srcr.plans.plan import CompressionPlan
from srcr.records.base_card import BaseCard
from srcr.records.estimate import Interval
from srcr.records.evaluation import Evaluation
from srcr.records.run import RunRecord
from srcr.records.sharing import CACHED, shareable
from srcr.records.snippets import usage

_BEGIN, _END = "<!-- evaluation -->", "<!-- end of evaluation -->"
#: The paper whose measures and joint compression these are.
_PAPER = "[arXiv:2505.07289](https://arxiv.org/abs/2505.07289)"


def hub_id(model: str) -> str | None:
    """The id that a model has on the hub: its name, or that of the hub's cache where it lies; None of a local
    folder."""
    cached = CACHED.search(Path(model).as_posix())
    if cached is not None:
        return cached["repo"].replace("--", "/", 1)
    return model if _is_id(model) and not Path(model).exists() else None


def _is_id(model: str) -> bool:
    """Whether a name is ``org/name`` as the hub allows it."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return model.count("/") == 1


def label(model: str) -> str:
    """A model's name for people: its id on the hub, or of a folder the last part."""
    folder = Path(model)
    return hub_id(model) or (folder.resolve().name if folder.is_dir() else model)


def labels(models: Sequence[str]) -> list[str]:
    """A label for each model; those that would be the same are spelt out."""
    short = [label(model) for model in models]
    return [m if short.count(s) > 1 else s for m, s in zip(models, short, strict=True)]


def model_card(record: RunRecord, plan: CompressionPlan) -> str:
    """README.md of a compressed checkpoint: nothing of the machine in it but figures."""
    record = shareable(record)
    rates = record.rates
    title = f"{_plain(label(record.base))}, compressed by srcr"
    quant = next((layer.quant for layer in plan.layers if layer.quant), None)
    prune = next((layer.prune for layer in plan.layers if layer.prune), None)
    methods = [m for m in (prune and prune.method, quant and quant.method) if m]
    return f"""---
{_metadata(record).to_yaml()}
---

# {title}

{100 * rates.sparsity:.1f} % of the weights of the decoder blocks' linear layers were pruned and the rest
stored in {rates.bits:g} bits on average ({" + ".join(methods) or "nothing"}, {plan.solver.mode}), as in
{_PAPER}.

{_figures(record)}

TCr counts neither scales nor embeddings; the byte counts include everything. `plan.yaml` holds the plan and
`srcr.json` the whole record.

## What was kept

{_BEGIN}
{_next_step(record.base)}
{_END}

## Use

{usage(record)}
## Limits

What the original gets wrong, this model gets wrong too. What it kept was measured on the texts and tasks that
are named above and on nothing else: measure on what you use it for, safety included.

{"".join(f"- {note}{chr(10)}" for note in record.notes)}
Made with: `{(record.command or "srcr.compress(...)").replace("`", "'")}`
"""


def _figures(record: RunRecord) -> str:
    """The table of how much smaller the model is and how it was made."""
    rates, text = record.rates, record.calibration
    entropy = "unknown" if rates.entropy_bits is None else f"{rates.entropy_bits:.2f}"
    rows = [
        (
            "theoretical compression rate (TCr, block linears, against 16 bits)",
            f"{100 * rates.tcr:.2f} %",
        ),
        ("planned sparsity", f"{100 * rates.sparsity:.2f} %"),
        ("weights that are exactly 0 (rounding adds some)", f"{100 * rates.zeros:.2f} %"),
        (
            "weight files on disk",
            f"{format_bytes(rates.stored_bytes)} (base {format_bytes(rates.base_bytes)})",
        ),
        (f"weights in memory ({rates.engine})", format_bytes(rates.loaded_bytes)),
        *((s.name, s.summary) for s in record.structures or ()),
        *((e.name, f"{e.bits} bits") for e in record.embeddings or ()),
        (
            "entropy of the codes, the bound that storage can reach",
            f"{entropy} bits a weight",
        ),
        ("calibration", f"{_plain(text.source)}, {text.size}"),
        *(("trained", r.summary) for r in record.recoveries or ()),
        ("time, peak memory", f"{record.seconds:.1f} s, {format_bytes(record.peak_memory_bytes)}"),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _next_step(base: str) -> str:
    """What measures the model: the bundled tasks are in the bundled model's language alone."""
    bundled = base == "bundled"
    known = base if bundled or hub_id(base) is not None else "BASE"
    tasks = " --tasks bundled" if bundled else ""
    return (
        f"Not measured yet: `srcr evaluate {known} THIS{tasks} --semantic --report` fills this in."
    )


def _metadata(record: RunRecord) -> Any:
    """The card's metadata: ``huggingface_hub.ModelCardData``."""
    from huggingface_hub import ModelCardData

    rates, base = record.rates, hub_id(record.base)
    card = record.base_card or BaseCard()
    quantized = rates.bits < 16
    kinds = (("pruning", rates.sparsity > 0), ("quantization", quantized))
    libraries = {"gguf": None, "archive": "srcr"}
    return ModelCardData(
        base_model=base,
        base_model_relation="quantized" if base and quantized else None,
        language=list(card.language) or None,
        library_name=libraries.get(record.format, record.loader),
        license=card.license,
        license_name=card.license_name,
        license_link=card.license_link,
        pipeline_tag="text-generation",
        tags=[
            "srcr",
            *([] if record.format == "dense" else [record.format]),
            *(tag for tag, holds in kinds if holds),
        ],
    )


def _plain(text: str) -> str:
    """A name in one line that Markdown and HTML show as it is."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def with_evaluation(card: str, evaluation: Evaluation) -> str:
    """The card with its evaluation part filled in, and the figures in its metadata; a card without that part
    (somebody wrote another) comes back unchanged."""
    evaluation = shareable(evaluation)
    part = f"{_BEGIN}\n{_evaluation_part(evaluation)}\n{_END}"
    filled, count = re.subn(
        f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", lambda _: part, card, count=1, flags=re.S
    )
    return _with_results(filled, evaluation) if count else card


def _with_results(card: str, evaluation: Evaluation) -> str:
    """The card with the figures as results in its metadata, where it has metadata."""
    from huggingface_hub import ModelCard

    if not card.startswith("---\n"):
        return card
    try:
        parsed = ModelCard(card)
        parsed.data.model_name = evaluation.compressed or "compressed"
        parsed.data.eval_results = _results(evaluation) or None
        return str(parsed)
    except (ValueError, YAMLError):  # somebody edited it: its text is filled in, its metadata stay
        return card


def _results(evaluation: Evaluation) -> list[Any]:
    """The figures as the hub shows them: every task's score, and on the text KL and perplexity."""
    from huggingface_hub import EvalResult

    def result(name: str, metric: str, value: float, about: str | None = None) -> Any:
        kind = re.sub(r"[^\w.-]+", "-", name).strip("-") or "text"
        return EvalResult(
            task_type="text-generation", dataset_type=kind, dataset_name=name,
            metric_type=metric, metric_value=round(value, 6), metric_name=about,
        )  # fmt: skip

    results = [
        result(name, task.metric or "accuracy", task.compressed)
        for name, task in evaluation.tasks.items()
    ]
    divergence, text = evaluation.divergence, evaluation.text
    if divergence is not None:
        source = text.source if text else "text"
        results += [
            result(source, "kl", divergence.kl.value, "KL to the base, nats a token"),
            result(source, "perplexity", divergence.perplexity.compressed),
        ]
    return results


def format_interval(ci95: Interval | None, digits: int) -> str:
    """An interval for people; nothing where there is none."""
    return "" if ci95 is None else f"{ci95[0]:.{digits}g} to {ci95[1]:.{digits}g}"


def _evaluation_part(evaluation: Evaluation) -> str:
    rows = [
        ("measure", "value", "95 % interval"),
        ("---", "---", "---"),
        *_retention_rows(evaluation),
        *_semantic_rows(evaluation),
        *_divergence_rows(evaluation),
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    text = evaluation.text
    source = f"Text: {_plain(text.source)}, {text.size}. " if text else ""
    return f"{table}\n\n{source}Made with: `{evaluation.command or 'srcr.evaluate(...)'}`"


def _retention_rows(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    rows = [
        (name, f"{value:.3f}", format_interval(ci95, 3))
        for name, value, ci95 in (
            ("Sr", evaluation.sr, evaluation.sr_ci95),
            ("SrCr", evaluation.srcr, evaluation.srcr_ci95),
        )
        if value is not None
    ]
    for name, task in evaluation.tasks.items():
        if task.retention is None:
            rows.append((f"{name}: retention", "undefined, the base is at chance", ""))
            continue
        p_value = "" if task.p_value is None else f", p {task.p_value:.2g}"
        about = (
            f"{name}: {task.compressed:.3f}, base {task.base:.3f}, chance {task.chance:.3f}"
            f"{p_value}; retention"
        )
        rows.append((about, f"{task.retention:.3f}", format_interval(task.ci95, 3)))
    return rows


def _semantic_rows(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    semantic = evaluation.semantic
    if semantic is None:
        return []
    about = f"semantic consistency over chance ({semantic.scorer}; chance {semantic.chance:.3f})"
    if semantic.normalised is None:
        return [(about, "undefined, all continuations are alike", "")]
    interval = format_interval(semantic.normalised_ci95, 3)
    return [(about, f"{semantic.normalised:.3f}", interval)]


def _divergence_rows(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    divergence = evaluation.divergence
    if divergence is None:
        return []
    kl, top1, flips = divergence.kl, divergence.top1_agreement, divergence.flips
    perplexity, ratio = divergence.perplexity, divergence.perplexity.ratio
    percentiles = (kl.p50, kl.p95, kl.p99, kl.p999)
    rows = [("KL to the base, nats a token", f"{kl.value:.4g}", format_interval(kl.ci95, 4))]
    if None not in percentiles:
        shown = " / ".join(f"{value:.3g}" for value in percentiles)
        rows.append(("KL, 50th / 95th / 99th / 99.9th percentile", shown, ""))
    rows.append(("same most likely token", f"{top1.value:.3f}", format_interval(top1.ci95, 3)))
    if flips is not None:
        about = "flips, right token to wrong or back"
        rows.append((about, f"{flips.value:.3f}", format_interval(flips.ci95, 3)))
    if ratio is not None:
        about = f"perplexity {perplexity.compressed:.3f}, base {perplexity.base:.3f}; ratio"
        rows.append((about, f"{ratio.value:.4f}", format_interval(ratio.ci95, 4)))
    return rows
