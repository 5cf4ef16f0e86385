"""The model card: what was done, how much smaller it is, and how to load it."""

from pathlib import Path

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
| calibration | {record.calibration["source"]}, {record.calibration["samples"]} x \
{record.calibration["seq_len"]} tokens |
| time, peak memory | {record.seconds:.1f} s, {size(record.peak_memory_bytes)} |

TCr counts neither scales nor embeddings; the byte counts include everything. What was kept is measured by
`srcr evaluate BASE THIS`. `plan.yaml` holds the plan and `srcr.json` the whole record.

{notes}
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```

Made with: `{record.command or "srcr.compress(...)"}`
"""
