"""The model card: what was done, how much smaller it is, and how to load it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from srcr.types import CompressionPlan, RunRecord


def size(n_bytes: float) -> str:
    """Bytes in the unit people use."""
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.2f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.2f} GB"


def label(model: str) -> str:
    """A model's name for people: of a folder its last part, of a hub id all of it."""
    folder = Path(model)
    return folder.resolve().name if folder.is_dir() else model


def labels(models: Sequence[str]) -> list[str]:
    """A label each; those that would be the same are given in full."""
    short = [label(model) for model in models]
    return [m if short.count(s) > 1 else s for m, s in zip(models, short, strict=True)]


def model_card(record: RunRecord, plan: CompressionPlan) -> str:
    """README.md of a compressed checkpoint."""
    rates = record.rates
    quant = next((layer.quant for layer in plan.layers if layer.quant), None)
    prune = next((layer.prune for layer in plan.layers if layer.prune), None)
    tags = ["srcr", *(["compressed-tensors"] if record.format == "compressed-tensors" else [])]
    methods = [m for m in (prune and prune.method, quant and quant.method) if m]
    tag_lines = "\n".join(f"- {tag}" for tag in [*tags, "pruning", "quantization"])
    base = label(record.base)
    notes = "".join(f"- {note}\n" for note in record.notes)
    entropy = "unknown" if rates.entropy_bits is None else f"{rates.entropy_bits:.2f}"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
base_model: {base}
tags:
{tag_lines}
---

# {base}, compressed by srcr

{100 * rates.sparsity:.1f} % of the weights of the decoder blocks' linear layers were pruned and the rest
stored in {rates.bits:g} bits on average ({" + ".join(methods) or "nothing"}, {plan.sweep.mode}).

| | |
|---|---|
| theoretical compression rate (TCr, block linears, against 16 bits) | {100 * rates.tcr:.2f} % |
| planned sparsity | {100 * rates.sparsity:.2f} % |
| weights that are exactly 0 (rounding adds some) | {100 * rates.zeros:.2f} % |
| weight files on disk | {size(rates.stored_bytes)} (base {size(rates.base_bytes)}) |
| weights in memory ({rates.engine}) | {size(rates.loaded_bytes)} |
| entropy of the codes, the bound that storage can reach | {entropy} bits a weight |
| calibration | {record.calibration["source"]}, {record.calibration["samples"]} x \
{record.calibration["seq_len"]} tokens |
| time, peak memory | {record.seconds:.1f} s, {size(record.peak_memory_bytes)} |

TCr counts neither scales nor embeddings; the byte counts include everything. `plan.yaml` holds the plan and
`srcr.json` the whole record.

## What was kept

{_BEGIN}
Not measured yet: `srcr evaluate BASE THIS --tasks bundled --semantic --report` fills this in.
{_END}

{notes}
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```

Made with: `{record.command or "srcr.compress(...)"}`
"""


_PERCENTILES = ("p50", "p95", "p99", "p999")
_BEGIN, _END = "<!-- evaluation -->", "<!-- end of evaluation -->"


def with_evaluation(card: str, evaluation: dict[str, Any]) -> str:
    """The card with its evaluation part filled from ``srcr evaluate``'s JSON; a card without that part
    (somebody wrote another) comes back unchanged."""
    part = f"{_BEGIN}\n{_kept(evaluation)}\n{_END}"
    return re.sub(
        f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", lambda _: part, card, count=1, flags=re.S
    )


def _kept(evaluation: dict[str, Any]) -> str:
    """The figures of an evaluation as a table."""
    divergence, text = evaluation["divergence"], evaluation["text"]
    ppl = divergence["perplexity"]
    rows = [("measure", "value", "95 % interval"), ("---", "---", "---")]
    for label, found, key in (("Sr", evaluation, "sr"), ("SrCr", evaluation, "srcr")):
        if found[key] is not None:
            rows.append((label, f"{found[key]:.3f}", interval(found[f"{key}_ci95"], 3)))
    for name, task in evaluation["tasks"].items():
        if task["retention"] is None:
            rows.append((f"{name}: retention", "undefined, the base is at chance", ""))
        else:
            label = (
                f"{name}: {task['compressed']:.3f}, base {task['base']:.3f}, chance {task['chance']:.3f}, "
                f"p {task['p_value']:.2g}; retention"
            )
            rows.append((label, f"{task['retention']:.3f}", interval(task["ci95"], 3)))
    if semantic := evaluation["semantic"]:
        about = f"semantic consistency over chance ({semantic['scorer']}; chance {semantic['chance']:.3f})"
        if semantic["normalised"] is None:
            rows.append((about, "undefined, all continuations are alike", ""))
        else:
            ci95 = interval(semantic["normalised_ci95"], 3)
            rows.append((about, f"{semantic['normalised']:.3f}", ci95))
    kl, top1, flips = divergence["kl"], divergence["top1_agreement"], divergence["flips"]
    rows += [
        ("KL to the base, nats a token", f"{kl['value']:.4g}", interval(kl["ci95"], 4)),
        (
            "KL, 50th / 95th / 99th / 99.9th percentile",
            " / ".join(f"{kl[p]:.3g}" for p in _PERCENTILES),
            "",
        ),
        ("same most likely token", f"{top1['value']:.3f}", interval(top1["ci95"], 3)),
        (
            "flips, right token to wrong or back",
            f"{flips['value']:.3f}",
            interval(flips["ci95"], 3),
        ),
        (
            f"perplexity {ppl['compressed']:.3f}, base {ppl['base']:.3f}; ratio",
            f"{ppl['ratio']['value']:.4f}",
            interval(ppl["ratio"]["ci95"], 4),
        ),
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        f"{table}\n\nText: {text['source']}, {text['samples']} x {text['seq_len']} tokens. Made with: "
        f"`{evaluation.get('command') or 'srcr.evaluate(...)'}`"
    )


def interval(ci95: list[float], digits: int) -> str:
    """An interval for people."""
    return f"{ci95[0]:.{digits}g} to {ci95[1]:.{digits}g}"
