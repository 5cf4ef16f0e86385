"""How fast models read and write, interleaved: what slows one down for a while slows down all."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from srcr.errors import InputError
from srcr.metrics.intervals import ratio_interval
from srcr.numerics.tensors import dtype_name
from srcr.records.evaluation import Speed, Throughput


@dataclass(frozen=True)
class SpeedSpec:
    """A prompt of ``prompt_len`` tokens is read, and ``new_tokens`` are written behind it, one sequence at a
    time, ``rounds`` times by every model in turn."""

    prompt_len: int = 256
    new_tokens: int = 32
    rounds: int = 10

    def __post_init__(self) -> None:
        if self.prompt_len < 1 or self.new_tokens < 2 or self.rounds < 2:
            raise InputError(
                "speed takes a prompt of at least 1 token, at least 2 new tokens and 2 rounds"
            )


@torch.no_grad()
def measure_speed(
    base: Any,
    models: Sequence[Any],
    input_ids: Tensor,
    spec: SpeedSpec,
    on_round: Callable[[int], None] = lambda done: None,
) -> list[Speed]:
    """The speed of each of ``models`` beside that of ``base``, all transformers models on one device, on
    prompts that rows of ``input_ids`` [n, len] begin with. A round before the first does not count."""
    everyone = [base, *models]
    seconds = np.zeros((2, len(everyone), spec.rounds))
    for number in range(-1, spec.rounds):
        row = input_ids[number % len(input_ids)]
        prompt = row[: spec.prompt_len].to(base.device)[None]
        # Everyone is first as often as last.
        order = range(len(everyone)) if number % 2 else reversed(range(len(everyone)))
        for which in order:
            times = _times(everyone[which], prompt, spec.new_tokens)
            if number >= 0:
                seconds[:, which, number] = times
        on_round(number + 1)
    length = min(spec.prompt_len, input_ids.shape[1])
    dtype = dtype_name(base.dtype)
    return [
        Speed(
            prefill=_throughput(length, seconds[0, 0], seconds[0, i]),
            decode=_throughput(spec.new_tokens - 1, seconds[1, 0], seconds[1, i]),
            prompt_len=length,
            new_tokens=spec.new_tokens,
            rounds=spec.rounds,
            device=base.device.type,
            threads=torch.get_num_threads(),
            dtype=dtype,
        )
        for i in range(1, len(everyone))
    ]


def _times(model: Any, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds until the first token behind a prompt [1, len], and for the others."""
    started = _now(prompt)
    output = model(prompt, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)
    read = _now(prompt)
    for _ in range(new_tokens - 1):
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    return read - started, _now(prompt) - read


def _now(tensor: Tensor) -> float:
    """The time when everything that was begun on the tensor's device is done."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def _throughput(tokens: int, base: Any, compressed: Any) -> Throughput:
    """Tokens a second by the median round, and compressed over base with its interval over rounds."""
    return Throughput(
        base=tokens / median(base),
        compressed=tokens / median(compressed),
        ratio=ratio_interval(np.asarray(base), np.asarray(compressed)),
    )
