"""A mixture of experts: statistics of the tokens that are routed to each, beside one Hessian for all.

    python scripts/train_mixture.py --out build/mixture
    python benchmarks/experts.py build/mixture/model [--priors 30,300,3000]

"all tokens" gives every expert of a layer the moments of all its tokens, as a tool does that does not know of
routing; each prior mixes a sample of those into the routed ones; "gates" weighs tokens by their routing
weights. Text of the bundled language, which the mixture is trained on: calibration and evaluation are streams
of their own. Prints a Markdown table of KL to the original, with the ratio to "all tokens".
"""

import argparse
import json
import math
import os
import tempfile
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import torch

import srcr
from srcr.bundled import texts

#: Settings by name: share of zeros, bits.
SETTINGS = {
    "4 bits": (0.0, 4),
    "3 bits": (0.0, 3),
    "2 bits": (0.0, 2),
    "25 % + 4": (0.25, 4),
    "50 % + 4": (0.5, 4),
}


def solvers(priors: list[float]) -> dict[str, srcr.SolverSpec]:
    """How experts are known, by name."""
    named = {f"prior {prior:g}": srcr.SolverSpec(expert_prior=prior) for prior in priors}
    return {
        "all tokens": srcr.SolverSpec(expert_prior=math.inf),
        "default": srcr.SolverSpec(),
        **named,
        "gates": srcr.SolverSpec(expert_gates=True),
    }


def main() -> None:
    """Compress, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--priors", default="30,3000")
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    calibration = srcr.Calibration(texts(600, 0), options.samples, options.seq_len)
    text = srcr.EvaluationText(texts(600, 1, "evaluation"), options.samples, options.seq_len)
    run = srcr.RunOptions(0, quiet=True)
    named = solvers([float(prior) for prior in options.priors.split(",")])
    print(f"| KL | {' | '.join(named)} |\n|{'---|' * (len(named) + 1)}")
    results: dict[str, dict[str, list[float]]] = {}
    for setting in options.settings.split(","):
        sparsity, bits = SETTINGS[setting]
        prune = srcr.PruneSpec(sparsity=sparsity) if sparsity else None
        with tempfile.TemporaryDirectory() as work:
            folders = []
            for number, solver in enumerate(named.values()):
                folders.append(Path(work) / str(number))
                recipe = srcr.Recipe(prune, srcr.QuantSpec(num_bits=bits, group_size=-1), solver)
                output = srcr.Output(folders[-1], format="dense")
                srcr.compress(options.model, output, recipe, calibration, run)
            evaluations = srcr.evaluate(options.model, folders, text, options=run)
        kls = [each.divergence.kl for each in evaluations if each.divergence]
        base = kls[0].value
        cells = [f"{kl.value:.5f} ({kl.value / base:.2f})" for kl in kls]
        print(f"| {setting} | {' | '.join(cells)} |", flush=True)
        results[setting] = {n: [kl.value, *kl.ci95] for n, kl in zip(named, kls, strict=True)}
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
