"""Blocks tuned one by one: straight-through Adam, as srcr does, beside SignRound's signed descent.

    python benchmarks/blockwise.py BASE COMPRESSED [--text SOURCE] [--steps 200]

SignRound (arXiv 2309.05516): what is added before rounding begins at 0 and stays within half a step, its
signed gradient is taken with a learning rate of 1/steps that falls linearly. Both under the frozen mask and
grid, on the same rows; a block changes only where KL on held-out text falls. Prints KL on unseen text.
"""

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import torch

from srcr.data.sources import TextRequest
from srcr.data.tokens import Tokens
from srcr.formats import detect
from srcr.metrics.predictions import has_pieces
from srcr.models.checkpoint import open_model
from srcr.pipelines.folder import read_records
from srcr.pipelines.opening import TextModel, load_text
from srcr.pipelines.options import RunOptions
from srcr.pipelines.recover import trainable
from srcr.pipelines.training import make_student
from srcr.plans.recovery import RecoverySpec
from srcr.recovery import blockwise
from srcr.recovery.step import Setting, held_out, learning_rate, optimizer_of
from srcr.recovery.student import Student
from srcr.recovery.teacher import Teacher


class SignDescent:
    """An optimizer of a block's latent numbers and scales by the signs of their gradients."""

    def __init__(self, part: Student, steps: int) -> None:
        latents = list(part.latents.values())
        self._starts = [latent.steps.round() for latent in latents]
        self.param_groups = [
            {"params": [latent.steps for latent in latents], "peak": 1 / steps, "lr": 0.0},
            {"params": [latent.log_gain for latent in latents], "peak": 0.1 / steps, "lr": 0.0},
        ]

    @torch.no_grad()
    def step(self) -> None:
        """Take a step."""
        for group in self.param_groups:
            for tensor in group["params"]:
                tensor.sub_(group["lr"] * tensor.grad.sign())
        for tensor, start in zip(self.param_groups[0]["params"], self._starts, strict=True):
            tensor.copy_(tensor.clamp(start - 0.5, start + 0.5))


def main() -> None:
    """Tune by both, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("compressed", type=Path)
    parser.add_argument("--text", default="self")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    opened = open_model(options.base)

    def text(samples: int, purpose: str) -> Tokens:
        request = TextRequest(options.text, samples, options.seq_len, samples, purpose, 0)
        return load_text(request, TextModel(opened, "cpu"), purpose, RunOptions(quiet=True))

    train, held, unseen = (
        text(options.samples, "recovery"),
        text(32, "held-out"),
        text(64, "evaluation"),
    )
    _, plan = read_records(options.compressed)
    checkpoint = trainable(
        detect(options.compressed).read(options.compressed), plan, options.compressed
    )
    whole = opened.loaded(torch.float32)
    teacher = Teacher(whole, has_pieces(whole, held.input_ids), [])
    spec = RecoverySpec(steps=options.steps, lr=options.lr)
    for name in ("straight-through Adam", "SignRound"):
        student = make_student(opened, checkpoint, torch.device("cpu"))
        if name == "SignRound":
            for latent in student.latents.values():
                latent.steps.round_()
            student = replace(student, plain={})
            blockwise.optimizer_of = lambda part, _: SignDescent(part, options.steps)
            blockwise.learning_rate = lambda step, steps: 1 - step / steps
        student.write()
        setting = Setting(student, teacher, train, spec, torch.float32)
        models = tuple(open_model(m).blockwise for m in (teacher.model, student.model))
        before, started = _kl(setting, unseen), time.monotonic()
        changed = blockwise.tune_blocks(
            setting, models, train, held, options.steps, lambda *_: None
        )
        print(
            f"{name}: KL {before:.4f} -> {_kl(setting, unseen):.4f}, {sum(changed)} of {len(changed)} blocks "
            f"changed, {time.monotonic() - started:.0f} s",
            flush=True,
        )
        blockwise.optimizer_of, blockwise.learning_rate = optimizer_of, learning_rate


def _kl(setting: Setting, tokens: Tokens) -> float:
    kl, count = held_out(setting.student, setting.teacher, tokens)
    return float(kl.sum() / count.sum())


if __name__ == "__main__":
    main()
