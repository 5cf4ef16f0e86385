"""A model's logits, a piece of the positions at a time: of a large vocabulary those of a whole batch take
more memory than everything else.

    predictions = predict(model, input_ids)
    predictions.logits(0, 64)
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from srcr.models.streaming import replaced_forward

#: Logits of a piece of the positions.
PIECE_LOGITS = 1 << 24
#: Tokens that show whether a model's logits can be had in pieces, and how far they may then be apart: as
#: far as products of another shape are rounded otherwise.
PROBE_TOKENS, TOLERANCE = 6, {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model makes of ``input_ids`` [n, len]: its last hidden states, in the ``output`` of its body, of
    which its own forward makes logits; or, where ``output`` is None, the ``whole`` logits."""

    model: Any
    input_ids: Tensor
    output: Any = None
    whole: Tensor | None = None

    def logits(self, start: int, stop: int) -> Tensor:
        """Logits [n, stop - start, vocabulary] of these positions."""
        if self.whole is not None:
            return self.whole[:, start:stop]
        states = self.output.last_hidden_state[:, start:stop].contiguous()
        output = with_states(self.output, states)
        with replaced_forward({self.model.base_model: lambda *args, **kwargs: output}):
            logits: Tensor = self.model(self.input_ids[:, start:stop], use_cache=False).logits
        return logits


def with_states(output: Any, states: Tensor) -> Any:
    """What a model's body returns, with other hidden states."""
    result = copy.copy(output)
    result["last_hidden_state"] = states
    return result


def pieces(model: Any, input_ids: Tensor) -> Iterator[tuple[int, int]]:
    """(start, stop) of pieces that cover every position of ``input_ids`` [n, len] that predicts a token."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    size = max(1, PIECE_LOGITS // (len(input_ids) * vocabulary))
    last = input_ids.shape[1] - 1
    for start in range(0, last, size):
        yield start, min(start + size, last)


def predict(model: Any, input_ids: Tensor, in_pieces: bool = True) -> Predictions:
    """The predictions of a transformers model for ``input_ids`` [n, len] on its device; ``in_pieces``: as
    :func:`has_pieces` says."""
    if not in_pieces:
        return Predictions(model, input_ids, whole=model(input_ids, use_cache=False).logits)
    outputs: list[Any] = []
    body: nn.Module = model.base_model
    forward: Callable[..., Any] = body.forward

    def kept(*args: Any, **kwargs: Any) -> Any:
        """What the body returns, of which the head is given the first position only."""
        outputs.append(forward(*args, **kwargs))
        return with_states(outputs[0], outputs[0].last_hidden_state[:, :1])

    with replaced_forward({body: kept}):
        model(input_ids, use_cache=False)
    (output,) = outputs
    return Predictions(model, input_ids, output)


@torch.no_grad()
def has_pieces(model: Any, input_ids: Tensor) -> bool:
    """Whether the logits of pieces are those of the whole row, tried on the first tokens of ``input_ids``
    [n, len]: so it is where a model's head sees each position alone."""
    if getattr(model, "base_model", model) is model:
        return False
    ids = input_ids[:1, :PROBE_TOKENS].to(model.device)
    whole = model(ids, use_cache=False).logits.float()
    middle = ids.shape[1] // 2
    try:
        predictions = predict(model, ids)
        pieces = [predictions.logits(*ends) for ends in ((0, middle), (middle, ids.shape[1]))]
        logits = torch.cat(pieces, dim=1).float()
    except Exception:  # models return what they like, and raise what they like without it
        return False
    error = (logits - whole).norm() / whole.norm().clamp_min(1e-30)
    return logits.shape == whole.shape and not bool(error > TOLERANCE.get(model.dtype, 1e-2))
