"""The model card: what was done, how much smaller it is, and how to load it."""

import re
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


def model_card(record: RunRecord, plan: CompressionPlan) -> str:
    """README.md of a compressed checkpoint."""
    rates = record.rates
    quant = next((layer.quant for layer in plan.layers if layer.quant), None)
    prune = next((layer.prune for layer in plan.layers if layer.prune), None)
    tags = ["srcr", *(["compressed-tensors"] if record.format == "compressed-tensors" else [])]
    methods = [m for m in (prune and prune.method, quant and quant.method) if m]
    tag_lines = "\n".join(f"- {tag}" for tag in [*tags, "pruning", "quantization"])
    base = Path(record.base).name if Path(record.base).is_dir() else record.base
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
            label = f"{name}: {task['compressed']:.3f}, base {task['base']:.3f}; retention"
            rows.append((label, f"{task['retention']:.3f}", interval(task["ci95"], 3)))
    if semantic := evaluation["semantic"]:
        label = f"semantic consistency over chance ({semantic['scorer']})"
        rows.append(
            (label, f"{semantic['normalised']:.3f}", interval(semantic["normalised_ci95"], 3))
        )
    kl, top1 = divergence["kl"], divergence["top1_agreement"]
    rows += [
        ("KL to the base, nats a token", f"{kl['value']:.4g}", interval(kl["ci95"], 4)),
        ("same most likely token", f"{top1['value']:.3f}", interval(top1["ci95"], 3)),
        (f"perplexity (base {ppl['base']:.3f})", f"{ppl['compressed']:.3f}", ""),
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        f"{table}\n\nText: {text['source']}, {text['samples']} x {text['seq_len']} tokens. Made with: "
        f"`{evaluation.get('command') or 'srcr.evaluate(...)'}`"
    )


def interval(ci95: list[float], digits: int) -> str:
    """An interval for people."""
    return f"{ci95[0]:.{digits}g} to {ci95[1]:.{digits}g}"
