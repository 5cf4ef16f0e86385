"""Rows of token ids without their padding: real tokens first, and how many there are."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from srcr.errors import InputError

#: A row of fewer tokens has nothing to predict.
FEWEST_TOKENS = 2


def stack_rows(rows: Sequence[Any], name: str) -> tuple[Tensor, Tensor | None]:
    """Lists of token ids as one tensor [n, len], and their lengths [n] where they differ (else None).

    Raises:
        InputError: they are no rows of numbers, or one has fewer than two.
    """
    try:
        if len({len(row) for row in rows}) <= 1:
            return torch.as_tensor(rows), None
        parts = [torch.as_tensor(row) for row in rows]
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: input_ids must be int64 [n, len]: {error}") from None
    lengths = torch.tensor([len(part) for part in parts])
    _check_lengths(lengths, name)
    if any(part.ndim != 1 or part.dtype not in (torch.int64, torch.int32) for part in parts):
        raise InputError(f"{name}: input_ids must be int64 [n, len], or lists of token ids")
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True), lengths


def align_left(ids: Tensor, attention_mask: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Token ids [n, len] so shifted that each row begins with its first real token, by an attention mask
    [n, len] (1: real, 0: padding, on either side), with zeros for padding; and the rows' lengths [n].

    Raises:
        InputError: the mask is of another shape or kind, has padding between tokens, or leaves fewer than two
            tokens in a row.
    """
    mask = _checked_mask(ids, attention_mask, name)
    lengths = mask.sum(1)
    _check_lengths(lengths, name)
    width = ids.shape[1]
    first = mask.int().argmax(1)
    end = width - mask.flip(1).int().argmax(1)
    holes = (end - first != lengths).nonzero()
    if len(holes):
        raise InputError(
            f"{name}: the attention_mask of row {int(holes[0])} has padding between tokens: put all padding "
            "of a row on one side"
        )
    columns = torch.arange(width)
    shifted = ids.gather(1, (columns + first[:, None]).clamp(max=width - 1))
    return shifted.masked_fill(columns >= lengths[:, None], 0), lengths


def trim(ids: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows without the columns that none of them uses; the lengths only where they differ."""
    if lengths is None or len(lengths) == 0:
        return ids, None
    longest = int(lengths.max())
    return ids[:, :longest], None if int(lengths.min()) == longest else lengths


def _checked_mask(ids: Tensor, mask: Tensor, name: str) -> Tensor:
    """The mask as booleans."""
    kind = mask.is_floating_point() or mask.is_complex()
    if ids.ndim != 2 or mask.shape != ids.shape or kind:
        raise InputError(
            f"{name}: attention_mask must be integers or booleans {list(ids.shape)}, as input_ids, got "
            f"{mask.dtype} {list(mask.shape)}"
        )
    mask = mask.cpu()
    wrong = ((mask != 0) & (mask != 1)).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        raise InputError(
            f"{name}: the attention_mask of row {row} holds {int(mask[row, column])}: use 1 for tokens and 0 "
            "for padding"
        )
    return mask.bool()


def _check_lengths(lengths: Tensor, name: str) -> None:
    short = (lengths < FEWEST_TOKENS).nonzero()
    if len(short):
        row = int(short[0])
        raise InputError(
            f"{name}: row {row} has {int(lengths[row])} token{'' if lengths[row] == 1 else 's'}, too little "
            "to predict: leave out rows of fewer than 2"
        )
