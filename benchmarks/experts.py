"""A mixture of experts: statistics of the tokens that are routed to each, beside one Hessian for all.

    python scripts/train_mixture.py --out build/mixture
    python benchmarks/experts.py build/mixture/model [--priors 30,300,3000]

"all tokens" gives every expert of a layer the moments of all its tokens, as a tool does that does not know of
routing; each prior mixes a sample of those into the routed ones; "gates" weighs tokens by their routing
weights. Text of the bundled language, which the mixture is trained on: calibration and evaluation are streams
of their own. Prints a Markdown table of KL to the original, with the ratio to "all tokens"; then one of KL
without a quarter and half of the experts: by REAP's score, by its sum over all tokens, by how often each is
chosen, and at random (the mean of some draws).
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
from srcr.data.sources import calibration_request, load_tokens
from srcr.engine.memory import token_batches
from srcr.models.checkpoint import open_model
from srcr.pipelines.opening import TextModel
from srcr.structure.depth import measured_rows, model_kl
from srcr.structure.experts import expert_contributions, least_experts
from srcr.transforms.fewer_experts import fewer_experts

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


def removals(model: str, calibration: srcr.Calibration, text: srcr.Calibration, draws: int) -> None:
    """Print the KL without some experts, by what chooses them."""
    opened = open_model(model)
    reader = TextModel(opened, "cpu")
    batches, held_out = (
        token_batches(load_tokens(calibration_request(each, 0), reader))
        for each in (calibration, text)
    )
    contributions = expert_contributions(opened.blockwise, batches, lambda _: None)
    rows = measured_rows(opened.blockwise, held_out)
    often = {name: sums[:, 1:].repeat(1, 2) for name, sums in contributions.items()}
    generator = torch.Generator().manual_seed(0)

    def kl(gone: dict[str, tuple[int, ...]]) -> float:
        smaller = opened.transformed(fewer_experts(opened, gone))
        return model_kl(opened.blockwise, rows, smaller.blockwise)

    print("\n| experts gone | REAP | sum | count | random |\n|---|---|---|---|---|")
    for share in (0.25, 0.5):
        count = round(share * next(iter(opened.topology.experts.values())))
        kls = [
            kl(least_experts(contributions, count, "routed")),
            kl(least_experts(contributions, count, "all")),
            kl(least_experts(often, count, "all")),
        ]
        drawn = []
        for _ in range(draws):
            scores = {n: torch.rand(s.shape, generator=generator) for n, s in often.items()}
            drawn.append(kl(least_experts(scores, count, "all")))
        kls.append(sum(drawn) / draws)
        print(f"| {share:.0%} | {' | '.join(f'{each:.4f}' for each in kls)} |", flush=True)


def main() -> None:
    """Compress, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--priors", default="30,3000")
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--draws", type=int, default=5, help="of experts at random")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    calibration = srcr.Calibration(texts(600, 0), options.samples, options.seq_len)
    held_out = srcr.Calibration(texts(600, 1, "evaluation"), options.samples, options.seq_len)
    text = srcr.EvaluationText(held_out.source, options.samples, options.seq_len)
    run = srcr.RunOptions(0, quiet=True)
    named = solvers([float(prior) for prior in options.priors.split(",")])
    print(f"| KL | {' | '.join(named)} |\n|{'---|' * (len(named) + 1)}")
    results: dict[str, dict[str, list[float]]] = {}
    for setting in filter(None, options.settings.split(",")):
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
    removals(options.model, calibration, held_out, options.draws)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
