"""vLLM, where it is installed: log-probabilities of the likeliest tokens, which stand for logits."""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from srcr.engines import Engine
from srcr.models.config import read_config

#: What vLLM's own numbers in 16 bits may differ by.
TOLERANCE = 1e-1


def _unavailable() -> str | None:
    return None if importlib.util.find_spec("vllm") else "the package vllm is not installed"


def _logits(folder: Path, ids: Tensor) -> Tensor:
    """Logits up to a constant a position: the logarithms of all tokens' probabilities."""
    from vllm import LLM, SamplingParams

    vocabulary = int(read_config(folder)["vocab_size"])
    engine = LLM(
        str(folder), skip_tokenizer_init=True, enforce_eager=True, max_logprobs=vocabulary,
        max_model_len=ids.shape[1] + 1,
    )  # fmt: skip
    asked = SamplingParams(max_tokens=1, temperature=0, logprobs=vocabulary, detokenize=False)
    rows = []
    for row in ids.tolist():
        prefixes = [{"prompt_token_ids": row[: end + 1]} for end in range(len(row))]
        outputs = engine.generate(prefixes, asked, use_tqdm=False)
        logits = torch.full((len(row), vocabulary), -torch.inf)
        for place, output in enumerate(outputs):
            for token, given in output.outputs[0].logprobs[0].items():
                logits[place, token] = given.logprob
        rows.append(logits)
    return torch.stack(rows)


ENGINE = Engine(
    name="vllm",
    unavailable=_unavailable,
    logits=_logits,
    reads=lambda format_name: format_name in ("compressed-tensors", "dense"),
    tolerance=TOLERANCE,
)
