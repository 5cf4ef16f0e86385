"""What training gives back: KL before and after `srcr recover`, on text that neither has seen.

    python benchmarks/recover.py MODEL -o WORK --minutes 10 [--configs 0.25+4,0+3,0+2a,0.5+4]
        [--calibration TEXT] [--train SOURCE ...] [--held-out SOURCE] [--text TEXT] [--tasks NAMES]

Each configuration (sparsity+bits, "a": asymmetric) is compressed, trained, and both are evaluated against
the original. What is in WORK already is taken up: a run that was cut off goes on. Prints a Markdown table;
WORK holds the evaluations of each configuration.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import torch

import srcr
from srcr.metrics.tasks import TaskSpec
from srcr.serialize import to_dict, to_json


def recipe_of(name: str, group_size: int) -> srcr.Recipe:
    """The recipe of "4", "0.25+4" or "0+2a"."""
    sparsity, _, bits = name.rpartition("+")
    quant = srcr.QuantSpec("gptq", int(bits.rstrip("a")), group_size, not bits.endswith("a"))
    prune = srcr.PruneSpec(sparsity=float(sparsity)) if float(sparsity or 0) else None
    return srcr.Recipe(prune, quant)


def main() -> None:
    """Compress, train, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("-o", "--work", type=Path, required=True)
    parser.add_argument("--configs", default="0.25+4,0+3,0+2a,0.5+4")
    parser.add_argument("--group-size", type=int, default=-1)
    parser.add_argument("--stage", default="distill", choices=["distill", "blockwise", "both"])
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--loss", default="kl")
    parser.add_argument("--train-what", default="codes", choices=["codes", "scales"])
    parser.add_argument("--calibration", default="self")
    parser.add_argument("--calibration-samples", type=int, default=256)
    parser.add_argument("--train", nargs="+", default=["self"])
    parser.add_argument("--train-samples", type=int, default=1024)
    parser.add_argument("--held-out", default="self")
    parser.add_argument("--text", default="self")
    parser.add_argument("--eval-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--tasks")
    parser.add_argument("--semantic", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run = srcr.RunOptions(0, quiet=True)
    calibration = srcr.Calibration(
        options.calibration, options.calibration_samples, options.seq_len
    )
    text = srcr.RecoveryText(
        tuple(options.train), options.train_samples, options.seq_len, options.held_out
    )
    given = {"lr": options.lr} if options.lr is not None else {}
    spec = srcr.RecoverySpec(
        options.stage, options.steps, options.minutes, options.batch, options.train_what,
        options.loss, **given,
    )  # fmt: skip
    tasks = None if options.tasks is None else TaskSpec(tuple(options.tasks.split(",")))
    unseen = srcr.EvaluationText(options.text, options.eval_samples, options.seq_len)
    print("| configuration | TCr | KL before | KL after | ratio | steps, tokens | stored |")
    print("|---|---|---|---|---|---|---|")
    for name in options.configs.split(","):
        folders = [options.work / f"{name}-{when}" for when in ("before", "after")]
        before, after = (srcr.Output(folder, resume=True) for folder in folders)
        recipe = recipe_of(name, options.group_size)
        srcr.compress(options.model, before, recipe, calibration, run)
        record = srcr.recover(options.model, folders[0], after, spec, text, run)
        semantic = srcr.SemanticSpec() if options.semantic else None
        results = srcr.evaluate(options.model, folders, unseen, tasks, semantic, run)
        (options.work / f"{name}.json").write_text(to_json([to_dict(r) for r in results]))
        kls = [each.divergence.kl for each in results if each.divergence]
        cells = [f"{kl.value:.4f} [{kl.ci95[0]:.4f}, {kl.ci95[1]:.4f}]" for kl in kls]
        recovery = (record.recoveries or ())[-1]
        print(
            f"| {name} | {results[1].rates.tcr:.4f} | {cells[0]} | {cells[1]} | "
            f"{kls[1].value / kls[0].value:.2f} | {recovery.steps}, {recovery.tokens} | "
            f"{results[1].rates.stored_bytes} |",
            flush=True,
        )
        for each, when in zip(results, ("before", "after"), strict=True):
            if each.sr is not None:
                print(f"<!-- {name} {when}: Sr {each.sr:.3f} {each.sr_ci95} -->", flush=True)
            if each.semantic is not None:
                print(f"<!-- {name} {when}: semantic {each.semantic.normalised} -->", flush=True)


if __name__ == "__main__":
    main()
