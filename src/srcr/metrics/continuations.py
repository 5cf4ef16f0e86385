"""What a model writes greedily after a prompt."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from srcr.data.decoding import Decoder
from srcr.data.tokens import context_length
from srcr.errors import InputError, NumericalError

#: Stands where a continuation has ended.
END = -1
#: At most so many rows, and so many logits, go through a model at a time.
BATCH_ROWS, BATCH_LOGITS = 64, 1 << 26


@torch.no_grad()
def continue_greedily(
    model: Any,
    prompts: Tensor,
    max_new_tokens: int,
    stop: Sequence[int],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    batch_rows: int = BATCH_ROWS,
) -> Tensor:
    """What ``model`` writes greedily, in float32, after each of ``prompts`` int64 [n, len], without
    padding: int64 [n, max_new_tokens], END from the first token of ``stop`` on. At most ``batch_rows``
    prompts go through the model at a time, fewer where its vocabulary is large.

    Raises:
        InputError: prompt and continuation are longer than the model's context.
        NumericalError: the model's predictions are not finite.
    """
    n, length = prompts.shape
    limit = context_length(model.config)
    if limit and length + max_new_tokens > limit:
        raise InputError(
            f"prompts of {length} tokens and {max_new_tokens} new ones exceed the model's context of "
            f"{limit}: ask for at most {max(limit - length, 0)} new ones, or for shorter prompts"
        )
    if model.dtype != torch.float32:
        model = copy.deepcopy(model).float()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    batch = max(1, min(batch_rows, BATCH_LOGITS // (vocabulary * length)))
    ends = torch.tensor(stop, dtype=torch.long, device=model.device)
    out = torch.full((n, max_new_tokens), END)
    for start in range(0, n, batch):
        ids = prompts[start : start + batch].to(model.device)
        goes_on = torch.ones(len(ids), dtype=torch.bool, device=model.device)
        decoder = Decoder(model)
        for position in range(max_new_tokens):
            logits = decoder.logits(ids)
            if not bool(torch.isfinite(logits).all()):
                raise NumericalError(
                    "the model's predictions are not finite, so it cannot write text"
                )
            ids = logits.argmax(-1, keepdim=True)
            goes_on &= ~torch.isin(ids[:, 0], ends)
            out[start : start + batch, position] = torch.where(goes_on, ids[:, 0], END).cpu()
            if not bool(goes_on.any()):
                break
        on_progress(min(start + batch, n), n)
    return out


def stop_tokens(model: Any) -> tuple[int, ...]:
    """The tokens that end a text, by the model's generation config or else its config."""
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        tokens = getattr(config, "eos_token_id", None)
        if tokens is not None:
            return (tokens,) if isinstance(tokens, int) else tuple(tokens)
    return ()


def decode(ids: Tensor, tokenizer: Any | None) -> list[str]:
    """Rows of token ids as text, up to END; without a tokenizer, the ids as numbers."""
    rows = [[token for token in row if token != END] for row in ids.tolist()]
    if tokenizer is None:
        return [" ".join(map(str, row)) for row in rows]
    return [
        tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for row in rows
    ]
