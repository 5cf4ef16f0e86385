"""At one theoretical rate (81.25 %): 25 % + 4 bits, in one pass and in the paper's sequences, against 3 bits.

    python benchmarks/joint_against_bits.py MODEL... [--blimp FOLDER] [--samples 256 --seq-len 256]

Every configuration is compressed on the same calibration text (written by the model itself) with one
symmetric scale a row, and compared with its base on other text: KL, top-1 agreement and perplexity with
paired 95 % intervals. Tasks are the bundled sets for `bundled`, and for the others BLiMP's sentence pairs
where a folder of them is given. Prints a Markdown table and writes JSON.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import torch

import srcr
from srcr import bundled
from srcr.models.load import load_tokenizer, resolve
from srcr.serialize import to_dict

CONFIGURATIONS: dict[str, tuple[float, int, str]] = {
    "4 bits": (0.0, 4, "joint"),
    "3 bits": (0.0, 3, "joint"),
    "25 % + 4 bits, joint": (0.25, 4, "joint"),
    "25 % + 4 bits, sequential A": (0.25, 4, "sequential-a"),
    "25 % + 4 bits, sequential B": (0.25, 4, "sequential-b"),
}


def task_items(model: str, blimp: Path | None) -> dict[str, list[bundled.Item]]:
    """Multiple-choice sets for a model; BLiMP as pairs of whole sentences."""
    if model == "bundled":
        return bundled.tasks()
    if blimp is None:
        return {}
    items = []
    for path in sorted(blimp.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            items.append(bundled.Item("", (row["sentence_good"], row["sentence_bad"]), 0))
    return {"blimp": items}


def accuracies(folder: Path, items: dict[str, list[bundled.Item]]) -> dict[str, float]:
    """Share of right choices on each set."""
    model, tokenizer = srcr.load(folder, torch.float32), load_tokenizer(folder)
    scored = {name: bundled.score(model, tokenizer, part) for name, part in items.items()}
    return {name: sum(right) / len(right) for name, right in scored.items()}


def measure(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every configuration of one model."""
    items = task_items(model, options.blimp)
    rows = [{"model": model, "configuration": "base", "tasks": accuracies(resolve(model), items)}]
    calibration = srcr.Calibration("self", options.samples, options.seq_len)
    quiet = srcr.RunOptions(quiet=True)
    with tempfile.TemporaryDirectory() as work:
        folders = []
        for i, (sparsity, bits, mode) in enumerate(CONFIGURATIONS.values()):
            prune = srcr.PruneSpec(sparsity=sparsity) if sparsity else None
            quant = srcr.QuantSpec(num_bits=bits, group_size=-1)
            recipe = srcr.Recipe(prune, quant, srcr.SolverSpec(mode=mode))
            folders.append(Path(work) / str(i))
            srcr.compress(model, folders[-1], recipe, calibration, quiet)
            print(f"{model}: {list(CONFIGURATIONS)[i]} compressed", flush=True)
        text = srcr.EvaluationText("self", options.eval_samples, options.seq_len)
        evaluations = srcr.evaluate(model, folders, text, options=quiet)
        for name, folder, each in zip(CONFIGURATIONS, folders, evaluations, strict=True):
            report = to_dict(each)
            rows.append(
                {"model": model, "configuration": name, "rates": report["rates"],
                 "divergence": report["divergence"], "tasks": accuracies(folder, items)}
            )  # fmt: skip
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """One table for one model."""
    names = list(rows[0]["tasks"])
    head = ["configuration", "TCr", "zeros", "KL [95 %]", "same top-1", "perplexity", *names]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        scores = [f"{row['tasks'][name]:.3f}" for name in names]
        if "rates" not in row:
            lines.append("| " + " | ".join(["base", "0", "", "", "", "", *scores]) + " |")
            continue
        kl, div = row["divergence"]["kl"], row["divergence"]
        cells = [
            row["configuration"],
            f"{100 * row['rates']['tcr']:.2f} %",
            f"{100 * row['rates']['zeros']:.1f} %",
            f"{kl['value']:.4f} [{kl['ci95'][0]:.4f}, {kl['ci95'][1]:.4f}]",
            f"{100 * div['top1_agreement']['value']:.1f} %",
            f"{div['perplexity']['compressed']:.3f} (base {div['perplexity']['base']:.3f})",
        ]
        lines.append("| " + " | ".join([*cells, *scores]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure every model that was named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--blimp", type=Path)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--eval-samples", type=int, default=192)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    every = []
    for model in options.models:
        rows = measure(model, options)
        every += rows
        print(f"\n### {Path(model).name}\n\n{markdown(rows)}\n", flush=True)
    if options.json:
        options.json.write_text(json.dumps(every, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
