"""Text that a model writes itself."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from srcr.data.decoding import Decoder
from srcr.data.tokens import bos_token
from srcr.errors import NumericalError

#: Sequences sampled from the model at a time.
SAMPLING_BATCH = 64
#: Positions between two reports of progress.
REPORT_EVERY = 32

OnProgress = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """Report nothing."""


@torch.no_grad()
def sample(
    model: Any,
    samples: int,
    length: int,
    seed: int,
    on_progress: OnProgress = no_progress,
    prefix: Sequence[int] = (),
) -> Tensor:
    """Sequences int64 [samples, length] that the model writes itself at temperature 1.

    Each starts with ``prefix``; without one with the config's BOS token, or where it has none with a token
    drawn at random (as in LLM-QAT, arXiv 2305.17888, section 2.1). Sampling does not touch the global random
    state.

    Raises:
        NumericalError: the model's predictions are not finite.
    """
    if model.device.type == "cpu" and model.dtype != torch.float32:
        model = copy.deepcopy(model).float()  # most CPUs are many times slower in 16 bits
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    bos = bos_token(model.config)
    if prefix:
        first = torch.tensor(prefix[:length]).repeat(samples, 1)
    elif bos is not None and 0 <= bos < vocabulary:
        first = torch.full((samples, 1), bos, dtype=torch.long)
    else:
        first = torch.randint(vocabulary, (samples, 1), generator=generator)
    batches = []
    for start in range(0, samples, SAMPLING_BATCH):
        ids = first[start : start + SAMPLING_BATCH]
        columns = [ids]
        decoder = Decoder(model)
        for position in range(first.shape[1], length):
            probabilities = decoder.logits(ids.to(model.device)).float().softmax(-1).cpu()
            if not bool(torch.isfinite(probabilities).all()):
                raise NumericalError(
                    "the model's own predictions are not finite, so it cannot write text: check it, or "
                    "give another source"
                )
            ids = torch.multinomial(probabilities, 1, generator=generator)
            columns.append(ids)
            if position % REPORT_EVERY == 0 or position + 1 == length:
                on_progress(start * length + len(ids) * (position + 1), samples * length)
        batches.append(torch.cat(columns, dim=1))
    return torch.cat(batches)
