"""What each part of the sweep is worth: KL to the base with parts switched off, on one model.

    python benchmarks/ablation.py MODEL [--samples 256 --seq-len 256 --eval-samples 192] [--json out.json]

Scales are one a row (`--group-size -1`), calibration only. Calibration text is written by the model itself,
the evaluation text too, from another seed stream; `--seed` gives other text. Prints a Markdown table.
"""

import argparse
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import torch

import srcr
from srcr.numerics import hessian, moments
from srcr.solver import problem

#: sparsity, bits, symmetric
CONFIGURATIONS = {
    "4 bits": (0.0, 4, True),
    "3 bits": (0.0, 3, True),
    "25 % + 4 bits": (0.25, 4, True),
    "4 bits, asymmetric": (0.0, 4, False),
    "3 bits, asymmetric": (0.0, 3, False),
    "25 % + 4 bits, asymmetric": (0.25, 4, False),
    "2 bits, asymmetric": (0.0, 2, False),
    "33 % + 3 bits": (1 / 3, 3, True),
    "50 % + 4 bits": (0.5, 4, True),
    "50 %": (0.5, 16, True),
}
FULL = srcr.SolverSpec()
VARIANTS = {
    "all": FULL,
    "no descent": replace(FULL, descent_rounds=0),
    "no dense targets": replace(FULL, dense_targets=False),
    "dense share 1": replace(FULL, dense_share=1.0),
    "dense share 0.5": replace(FULL, dense_share=0.5),
    "dense share 0.25": replace(FULL, dense_share=0.25),
    "dense share 0.125": replace(FULL, dense_share=0.125),
    "neither": replace(FULL, descent_rounds=0, dense_targets=False),
    "1 round of descent": replace(FULL, descent_rounds=1),
    "2 rounds of descent": replace(FULL, descent_rounds=2),
    "8 rounds of descent": replace(FULL, descent_rounds=8),
    "damping 0.001": replace(FULL, dampening_frac=0.001),
    "damping 0.05": replace(FULL, dampening_frac=0.05),
    "blocks of 32": replace(FULL, block_size=32),
}


def main() -> None:
    """Compress and measure every configuration and variant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--eval-samples", type=int, default=192)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--calibration", default="self")
    parser.add_argument("--text", default="self")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variants", default="all,no descent,no dense targets,neither")
    parser.add_argument(
        "--config", action="append", choices=list(CONFIGURATIONS), help="[default: all]"
    )
    parser.add_argument(
        "--target-step",
        type=float,
        help="of dense targets, in place of srcr's own (docs/decisions/009)",
    )
    parser.add_argument(
        "--most-energy",
        type=float,
        help="of a token, in place of srcr's own times the median; inf: any (docs/decisions/012)",
    )
    parser.add_argument(
        "--swaps",
        type=float,
        help="of a mask, the most as a share of a row's weights, in place of srcr's own (docs/method.md)",
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.target_step is not None:
        hessian.TARGET_STEP = options.target_step
    if options.most_energy is not None:
        moments.MOST_ENERGY = options.most_energy
    if options.swaps is not None:
        problem.SWAPS = options.swaps
    torch.set_num_threads(options.threads)
    variants = options.variants.split(",")
    calibration = srcr.Calibration(options.calibration, options.samples, options.seq_len)
    text = srcr.EvaluationText(options.text, options.eval_samples, options.seq_len)
    run = srcr.RunOptions(options.seed, quiet=True)
    results: dict[str, dict[str, float]] = {}
    print("| configuration | TCr | " + " | ".join(variants) + " |")
    print("|" + "---|" * (len(variants) + 2))
    for name in options.config or CONFIGURATIONS:
        sparsity, bits, symmetric = CONFIGURATIONS[name]
        prune = srcr.PruneSpec(sparsity=sparsity) if sparsity else None
        quant = None
        if bits < 16:
            quant = srcr.QuantSpec(num_bits=bits, group_size=-1, symmetric=symmetric)
        with tempfile.TemporaryDirectory() as work:
            folders = [Path(work) / str(i) for i in range(len(variants))]
            for variant, folder in zip(variants, folders, strict=True):
                recipe = srcr.Recipe(prune, quant, VARIANTS[variant])
                out = srcr.Output(folder, format="dense")
                record = srcr.compress(options.model, out, recipe, calibration, run)
            evaluations = srcr.evaluate(options.model, folders, text, options=run)
        kls = [each.divergence.kl.value for each in evaluations if each.divergence]
        results[name] = dict(zip(variants, kls, strict=True))
        cells = " | ".join(f"{kl:.4f}" if kl >= 0.01 else f"{kl:.6f}" for kl in kls)
        print(f"| {name} | {record.rates.tcr:.4f} | {cells} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
