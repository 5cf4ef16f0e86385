"""What calibrates best of the texts that an instruct model writes itself: from BOS, as chats, half and half.

    python benchmarks/beginnings.py MODEL WIKITEXT2_TEST.txt [--samples 64 --eval-samples 32]

The model is compressed at 25 % + 4 bits with one scale a row on each of the texts, and measured on other text
of the first two kinds, from other seeds, and on the file. Prints a Markdown table of KL with intervals.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor

import srcr
from srcr.data.packing import chat_beginning
from srcr.data.sampling import TextPlan, write_text
from srcr.data.tokens import bos_token
from srcr.models.checkpoint import open_model
from srcr.numerics import moments
from srcr.pipelines.opening import TextModel

RECIPE = srcr.Recipe(
    srcr.PruneSpec(sparsity=0.25), srcr.QuantSpec(num_bits=4, group_size=-1), srcr.SolverSpec()
)


def main() -> None:
    """Write the texts, compress on each, measure on all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--eval-samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--most-energy", type=float, help="as of ablation.py")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.most_energy is not None:
        moments.MOST_ENERGY = options.most_energy
    opened = open_model(options.model)
    bos, chat = bos_token(opened.config), chat_beginning(opened.tokenizer)
    if bos is None or not chat:
        raise SystemExit(f"{options.model} has no BOS token, or no chat template")
    writer = TextModel(opened, "cpu")

    def written(beginning: tuple[int, ...], samples: int, seed: int) -> Tensor:
        return write_text(writer, TextPlan(samples, options.seq_len, seed, (beginning,)))

    texts = {
        "from BOS": written((bos,), options.samples, 1),
        "chats": written(chat, options.samples, 2),
    }
    half = options.samples // 2
    texts["half and half"] = torch.cat([ids[:half] for ids in texts.values()])
    measured = {
        "the file": srcr.EvaluationText(options.text, options.eval_samples, options.seq_len),
        "its chats": srcr.EvaluationText(written(chat, options.eval_samples, 3)),
        "its text from BOS": srcr.EvaluationText(written((bos,), options.eval_samples, 4)),
    }
    run = srcr.RunOptions(quiet=True)
    with tempfile.TemporaryDirectory() as work:
        folders = [Path(work) / str(number) for number in range(len(texts))]
        for ids, folder in zip(texts.values(), folders, strict=True):
            srcr.compress(opened, srcr.Output(folder), RECIPE, ids, run)
        columns = [
            [each.divergence.kl for each in srcr.evaluate(opened, folders, text, options=run)]
            for text in measured.values()
        ]
    print("| calibration |", " | ".join(measured), "|\n" + "|---" * (len(measured) + 1) + "|")
    for name, kls in zip(texts, zip(*columns, strict=True), strict=True):
        cells = (f"{kl.value:.3f} [{kl.ci95[0]:.3f}, {kl.ci95[1]:.3f}]" for kl in kls)
        print(f"| {name} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
