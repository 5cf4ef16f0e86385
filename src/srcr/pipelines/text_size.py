"""How much text a command asks for, before any is read."""

from collections.abc import Sequence

import torch
from torch import Tensor

from srcr.data.sources import calibration_request
from srcr.data.specs import Calibration, RecoveryText, Source
from srcr.data.tokens import Tokens, context_length
from srcr.engine.memory import BATCH_TOKENS, token_batches
from srcr.models.checkpoint import OpenModel


def asked_text(calibration: Calibration | Tokens | Source) -> Calibration | Tokens:
    """The token ids that were given, else what text is asked for."""
    return calibration if isinstance(calibration, Tokens) else Calibration.of(calibration)


def row_length(text: Calibration | RecoveryText, opened: OpenModel) -> int:
    """Tokens of a row, of which there is none longer than the model's context."""
    return min(text.seq_len, context_length(opened.config) or text.seq_len)


def empty_batches(
    calibration: Calibration | Tokens | Source, opened: OpenModel
) -> Sequence[Tensor]:
    """Rows without data, as many as are asked for."""
    text = asked_text(calibration)
    if isinstance(text, Tokens):
        return token_batches(text)
    request = calibration_request(text, 0)
    length, samples = row_length(text, opened), request.samples or request.default_samples
    rows = torch.empty(samples, length, dtype=torch.int64, device="meta")
    return torch.split(rows, max(1, BATCH_TOKENS // length))


def text_size(calibration: Calibration | Tokens | Source, batches: Sequence[Tensor]) -> str:
    """The name of a text, and how much of it is asked for."""
    text = asked_text(calibration)
    name = text.source if isinstance(text, Tokens) else calibration_request(text, 0).name
    rows = sum(len(ids) for ids in batches)
    return f"{name}: at most {rows} x {max(ids.shape[1] for ids in batches)} tokens"
