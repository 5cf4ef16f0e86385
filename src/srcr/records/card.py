"""The model card: what was done, how much smaller the model is, and how to load it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from srcr.environment import format_bytes
from srcr.plans.plan import CompressionPlan
from srcr.records.estimate import Interval
from srcr.records.evaluation import Evaluation
from srcr.records.run import RunRecord

#: A snapshot in the hub's cache.
_CACHED = re.compile(r"(?:^|/)models--(?P<repo>[^/]+--[^/]+)/snapshots/[0-9a-f]{7,40}/?$")
#: How a checkpoint becomes a transformers model, by the library that opens it.
_LOADING = {
    "transformers": """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")""",
    "srcr": """import srcr  # transformers alone does not load packed embeddings

model = srcr.load("path/to/this/folder")""",
}
_BEGIN, _END = "<!-- evaluation -->", "<!-- end of evaluation -->"


def hub_id(model: str) -> str | None:
    """The id that a model has on the hub: its name, or that of the hub's cache where it lies; None of a local
    folder."""
    cached = _CACHED.search(Path(model).as_posix())
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
    """README.md of a compressed checkpoint."""
    rates = record.rates
    quant = next((layer.quant for layer in plan.layers if layer.quant), None)
    prune = next((layer.prune for layer in plan.layers if layer.prune), None)
    tags = ["srcr", *(["compressed-tensors"] if record.format == "compressed-tensors" else [])]
    methods = [m for m in (prune and prune.method, quant and quant.method) if m]
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if (base_id := hub_id(record.base)) is not None:
        metadata["base_model"] = base_id
    metadata["tags"] = [*tags, "pruning", "quantization"]
    header = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    base = _plain(label(record.base))
    notes = "".join(f"- {note}\n" for note in record.notes)
    entropy = "unknown" if rates.entropy_bits is None else f"{rates.entropy_bits:.2f}"
    text = record.calibration
    structures = "".join(f"| {s.name} | {s.summary} |\n" for s in record.structures or ())
    recoveries = "".join(f"| trained | {r.summary} |\n" for r in record.recoveries or ())
    embeddings = "".join(f"| {e.name} | {e.bits} bits |\n" for e in record.embeddings or ())
    return f"""---
{header}---

# {base}, compressed by srcr

{100 * rates.sparsity:.1f} % of the weights of the decoder blocks' linear layers were pruned and the rest
stored in {rates.bits:g} bits on average ({" + ".join(methods) or "nothing"}, {plan.solver.mode}).

| | |
|---|---|
| theoretical compression rate (TCr, block linears, against 16 bits) | {100 * rates.tcr:.2f} % |
| planned sparsity | {100 * rates.sparsity:.2f} % |
| weights that are exactly 0 (rounding adds some) | {100 * rates.zeros:.2f} % |
| weight files on disk | {format_bytes(rates.stored_bytes)} (base {format_bytes(rates.base_bytes)}) |
| weights in memory ({rates.engine}) | {format_bytes(rates.loaded_bytes)} |
{structures}{embeddings}| entropy of the codes, the bound that storage can reach | {entropy} bits a weight |
| calibration | {_plain(text.source)}, {text.size} |
{recoveries}| time, peak memory | {record.seconds:.1f} s, {format_bytes(record.peak_memory_bytes)} |

TCr counts neither scales nor embeddings; the byte counts include everything. `plan.yaml` holds the plan and
`srcr.json` the whole record.

## What was kept

{_BEGIN}
Not measured yet: `srcr evaluate BASE THIS --tasks bundled --semantic --report` fills this in.
{_END}

{notes}
```python
{_LOADING[record.loader]}
```

Made with: `{(record.command or "srcr.compress(...)").replace("`", "'")}`
"""


def _plain(text: str) -> str:
    """A name in one line that Markdown and HTML show as it is."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def with_evaluation(card: str, evaluation: Evaluation) -> str:
    """The card with its evaluation part filled in; a card without that part (somebody wrote another) comes
    back unchanged."""
    part = f"{_BEGIN}\n{_evaluation_part(evaluation)}\n{_END}"
    return re.sub(
        f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", lambda _: part, card, count=1, flags=re.S
    )


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
    source = f"Text: {text.source}, {text.size}. " if text else ""
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
