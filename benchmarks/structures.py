"""Removing channels and heads: srcr's choice beside FLAP's and magnitude's, with and without compensation.

    python benchmarks/structures.py MODEL --calibration TEXT --text TEXT [--remove channels=0.2]

Each choice of what goes is tried with nothing that makes up for it, with a refit to the outputs of the
model's own inputs, and with a refit to the dense model's outputs, as srcr does. FLAP's score (arXiv
2312.11983) is Var(x_j) |W_j|^2 of the consumer's inputs in the dense model; magnitude's is |W_j|^2. Nothing
is quantized. Prints a Markdown table.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from torch import Tensor

import srcr
from srcr.data.sources import calibration_request, load_tokens
from srcr.data.specs import Calibration
from srcr.models.checkpoint import open_model
from srcr.numerics import hessian, moments
from srcr.numerics.elements import choose_elements
from srcr.pipelines import compress as pipeline
from srcr.pipelines.opening import TextModel
from srcr.plans.structures import parse_structures
from srcr.structure.choose import Choose, RemovalMethod
from srcr.structure.sizes import coupled

COMPENSATIONS = {
    "nothing": {"compensates": False, "dense_targets": True},
    "own inputs": {"compensates": True, "dense_targets": False},
    "dense targets": {"compensates": True, "dense_targets": True},
}


def grouped(scores: Tensor, size: int, count: int) -> Tensor:
    """The groups of columns with the smallest sums of scores [cols]."""
    return torch.argsort(scores.view(-1, size).sum(1), stable=True)[:count].sort().values


def magnitude(W: Tensor, _: Tensor, size: int, count: int) -> Tensor:
    """The smallest weights."""
    return grouped(W.square().sum(0), size, count)


def flap(variances: Iterator[Tensor]) -> Choose:
    """FLAP's score, for consumers in the order of a walk."""

    def choose(W: Tensor, _: Tensor, size: int, count: int) -> Tensor:
        return grouped(next(variances).to(W) * W.square().sum(0), size, count)

    return choose


@torch.no_grad()
def input_variances(model: str, calibration: Calibration, kinds: list[str]) -> list[Tensor]:
    """The variance of every consumer's inputs in the dense model, in the order of a walk."""
    opened = open_model(model)
    tokens = load_tokens(calibration_request(calibration, 0), TextModel(opened, "cpu"))
    linears = opened.topology.parameters()
    names = {linears[c.consumers[0].parameter] for kind in kinds for c in coupled(opened, kind)}
    ordered = [name for name in opened.topology.linears() if name in names]
    sums = {name: [0.0, torch.zeros(1), torch.zeros(1)] for name in ordered}
    whole = opened.loaded(torch.float32)

    def watch(name: str) -> Callable[..., None]:
        def hook(_: object, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            entry = sums[name]
            entry[0] += len(x)
            entry[1] = entry[1] + x.sum(0)
            entry[2] = entry[2] + x.square().sum(0)

        return hook

    handles = [whole.get_submodule(name).register_forward_pre_hook(watch(name)) for name in ordered]
    for batch in tokens.batches(2048):
        whole(batch.input_ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return [s2 / n - (s1 / n) ** 2 for n, s1, s2 in sums.values()]


def main() -> None:
    """Remove, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--remove", default="channels=0.2")
    parser.add_argument("--calibration", default="self")
    parser.add_argument("--text", default="self")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--eval-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--choices", default="srcr,FLAP,magnitude")
    parser.add_argument("--compensations", default=",".join(COMPENSATIONS))
    parser.add_argument("--dense-share", type=float, help="of the batches, as compress")
    parser.add_argument("--dampening-frac", type=float, default=0.01)
    parser.add_argument("--target-step", type=float, help="of dense targets (docs/decisions/009)")
    parser.add_argument("--most-energy", type=float, help="of a token (docs/decisions/012)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.target_step is not None:
        hessian.TARGET_STEP = options.target_step
    if options.most_energy is not None:
        moments.MOST_ENERGY = options.most_energy
    calibration = Calibration(options.calibration, options.samples, options.seq_len)
    text = srcr.EvaluationText(options.text, options.eval_samples, options.seq_len)
    spec = parse_structures(options.remove)
    kinds = [kind for kind in spec.amounts() if kind != "layers"]
    variances = input_variances(options.model, calibration, kinds)
    solver = srcr.SolverSpec(dense_share=options.dense_share)
    recipe = srcr.Recipe(None, None, solver, structures=spec)
    run = srcr.RunOptions(0, quiet=True)
    results: dict[str, dict[str, list[float]]] = {}
    columns = options.compensations.split(",")
    print(
        f"| {options.remove}: what goes | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}"
    )
    for choice in options.choices.split(","):
        with tempfile.TemporaryDirectory() as work:
            folders = []
            for column in columns:
                choose = {"srcr": choose_elements, "magnitude": magnitude}.get(choice)
                choose = choose or flap(iter(variances))
                method = RemovalMethod(
                    choose, **COMPENSATIONS[column], dampening_frac=options.dampening_frac
                )
                pipeline.removal_method = lambda _, method=method: method
                folders.append(Path(work) / column.replace(" ", "-"))
                out = srcr.Output(folders[-1], format="dense")
                srcr.compress(options.model, out, recipe, calibration, run)
            evaluations = srcr.evaluate(options.model, folders, text, options=run)
        kls = [each.divergence.kl for each in evaluations if each.divergence]
        cells = [f"{kl.value:.4f} [{kl.ci95[0]:.4f}, {kl.ci95[1]:.4f}]" for kl in kls]
        print(f"| {choice} | {' | '.join(cells)} |", flush=True)
        results[choice] = {c: [kl.value, *kl.ci95] for c, kl in zip(columns, kls, strict=True)}
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
