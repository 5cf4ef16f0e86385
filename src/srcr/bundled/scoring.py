"""Multiple-choice scoring by the log-likelihood of the choices."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import log_softmax
from torch.nn.utils.rnn import pad_sequence

from srcr.bundled.items import Item

#: At most so many choices, and so many logits, at a time.
BATCH_CHOICES, BATCH_LOGITS = 256, 1 << 26


@torch.no_grad()
def log_likelihoods(
    model: torch.nn.Module,
    tokenizer: Any,
    items: Sequence[Item],
    on_progress: Callable[[float], None] = lambda share: None,
) -> list[list[float]]:
    """The summed log-likelihood of each choice's tokens after the prompt, item by item.

    A prompt goes through the model once for all of its choices. Items with prompts of one length and as
    many choices make batches, so that no prompt is padded; ``on_progress`` is told the share of items
    that is done.
    """
    prompts = [tokenizer(item.prompt)["input_ids"] for item in items]
    tails = [
        [
            ids[len(prompt) :]
            for ids in tokenizer([item.prompt + c for c in item.choices])["input_ids"]
        ]
        for item, prompt in zip(items, prompts, strict=True)
    ]
    alike: dict[tuple[int, int], list[int]] = {}
    for i, (prompt, tail) in enumerate(zip(prompts, tails, strict=True)):
        alike.setdefault((len(prompt), len(tail)), []).append(i)

    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    sums: list[list[float]] = [[] for _ in items]
    done = 0
    was_training = model.training
    model.eval()
    for (_, n_choices), members in alike.items():
        longest = max(len(ids) for i in members for ids in [prompts[i], *tails[i]])
        size = max(1, min(BATCH_CHOICES, BATCH_LOGITS // (vocabulary * longest)) // n_choices)
        for begin in range(0, len(members), size):
            batch = members[begin : begin + size]
            sums_of_batch = _choices(model, [prompts[i] for i in batch], [tails[i] for i in batch])
            for i, row in zip(batch, sums_of_batch.tolist(), strict=True):
                sums[i] = row
            done += len(batch)
            on_progress(done / len(items))
    model.train(was_training)
    return sums


def _choices(
    model: torch.nn.Module, prompts: list[list[int]], tails: list[list[list[int]]]
) -> torch.Tensor:
    """Log-likelihoods [items, choices] of prompts of one length, each with as many choices."""
    device = next(model.parameters()).device
    n_choices = len(tails[0])
    rows = [torch.tensor(tail) for choices in tails for tail in choices]
    ids = pad_sequence(rows, batch_first=True)
    scored = pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True)
    start = model(input_ids=torch.tensor(prompts, device=device), use_cache=True)
    cache: Any = getattr(start, "past_key_values", None)
    before = ids[:, :-1].to(device)
    if hasattr(cache, "batch_repeat_interleave"):
        cache.batch_repeat_interleave(n_choices)
        logits = [start.logits[:, -1:].repeat_interleave(n_choices, dim=0)]
        if before.shape[1] > 0:
            logits.append(model(input_ids=before, past_key_values=cache, use_cache=True).logits)
    else:  # Mamba's, say, which is no such thing: the prompt runs again before each choice
        again = torch.tensor(prompts, device=device).repeat_interleave(n_choices, dim=0)
        whole = model(input_ids=torch.cat([again, before], dim=1), use_cache=False).logits
        logits = [whole[:, again.shape[1] - 1 :]]
    odds = log_softmax(torch.cat(logits, dim=1).float(), dim=-1).cpu()
    gathered = odds.gather(-1, ids[..., None])[..., 0]
    return (gathered * scored).sum(-1).view(len(prompts), n_choices)


def score(
    model: torch.nn.Module,
    tokenizer: Any,
    items: Sequence[Item],
    on_progress: Callable[[float], None] = lambda share: None,
) -> list[bool]:
    """Whether the model gives the right choice of each item the highest log-likelihood."""
    likelihoods = log_likelihoods(model, tokenizer, items, on_progress)
    return [
        max(range(len(row)), key=row.__getitem__) == item.answer
        for row, item in zip(likelihoods, items, strict=True)
    ]
