"""Multiple-choice scoring by the log-likelihood of the choices."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import log_softmax

from srcr.bundled.items import Item


@torch.no_grad()
def log_likelihoods(
    model: torch.nn.Module, tokenizer: Any, items: Sequence[Item], batch_size: int = 64
) -> list[list[float]]:
    """The summed log-likelihood of each choice's tokens after the prompt, item by item."""
    rows: list[tuple[list[int], int]] = []
    for item in items:
        start = len(tokenizer(item.prompt)["input_ids"])
        encoded = tokenizer([item.prompt + choice for choice in item.choices])["input_ids"]
        rows.extend((ids, start) for ids in encoded)

    sums = [0.0] * len(rows)
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    for begin in range(0, len(rows), batch_size):
        chosen = by_length[begin : begin + batch_size]
        width = max(len(rows[i][0]) for i in chosen)
        ids = torch.zeros(len(chosen), width, dtype=torch.long)
        scored = torch.zeros(len(chosen), width - 1)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(chosen):
            tokens, start = rows[i]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
            scored[row, start - 1 : len(tokens) - 1] = 1
        ids = ids.to(device)
        logits = model(input_ids=ids, attention_mask=mask.to(device)).logits[:, :-1].float()
        found = log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0].cpu()
        for i, total in zip(chosen, (found * scored).sum(-1).tolist(), strict=True):
            sums[i] = total
    model.train(was_training)

    by_item = iter(sums)
    return [[next(by_item) for _ in item.choices] for item in items]


def score(
    model: torch.nn.Module, tokenizer: Any, items: Sequence[Item], batch_size: int = 64
) -> list[bool]:
    """Whether the model gives the right choice of each item the highest log-likelihood."""
    likelihoods = log_likelihoods(model, tokenizer, items, batch_size)
    return [
        max(range(len(row)), key=row.__getitem__) == item.answer
        for row, item in zip(likelihoods, items, strict=True)
    ]
