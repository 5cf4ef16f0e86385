"""Token ids, and what a run needs of a model to make them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from srcr.data.padding import align_left, stack_rows, trim
from srcr.errors import InputError
from srcr.records.text import TextRecord


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one length, without padding: their numbers ``rows`` int64 [k] and ``input_ids`` int64
    [k, len]."""

    rows: Tensor
    input_ids: Tensor


@dataclass(frozen=True, eq=False)
class Tokens:
    """Rows of token ids: ``input_ids`` int64 [n, len], where they come from, and a hash of them. ``lengths``
    int64 [n]: how many tokens of each row are real, padding follows them (None: all); ``prefix``: the tokens
    that each row begins with, as the model expects; ``notes``: what people should know."""

    input_ids: Tensor
    source: str
    sha256: str
    lengths: Tensor | None = None
    prefix: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        input_ids: Tensor | Sequence[Sequence[int]],
        source: str = "token ids",
        attention_mask: Tensor | None = None,
        prefix: Sequence[int] = (),
    ) -> "Tokens":
        """Token ids [n, len], or rows of any length, with their hash. ``attention_mask`` [n, len]: 1 for
        tokens, 0 for padding, which is cut off.

        Raises:
            InputError: the mask does not fit, or leaves fewer than two tokens in a row.

        >>> Tokens.of([[1, 5, 6], [1, 7]]).lengths
        tensor([3, 2])
        """
        lengths = None
        if not isinstance(input_ids, Tensor):
            input_ids, lengths = stack_rows(input_ids, source)
        ids = input_ids.cpu()
        if attention_mask is not None:
            if lengths is not None:
                raise InputError(f"{source}: rows of different length take no attention_mask")
            ids, lengths = align_left(ids, torch.as_tensor(attention_mask), source)
        ids, lengths = trim(ids.to(torch.int64), lengths)
        ids = ids.contiguous()
        digest = hashlib.sha256(ids.numpy().tobytes())
        if lengths is not None:
            digest.update(lengths.numpy().tobytes())
        return cls(ids, source, digest.hexdigest(), lengths, tuple(prefix))

    @classmethod
    def joined(cls, parts: Sequence["Tokens"]) -> "Tokens":
        """The rows of several, in order."""
        if len(parts) == 1:
            return parts[0]
        rows = [row.tolist() for part in parts for row in part.rows()]
        prefixes = {part.prefix for part in parts}
        prefix = prefixes.pop() if len(prefixes) == 1 else ()
        source = " + ".join(part.source for part in parts)
        notes = tuple(note for part in parts for note in part.notes)
        return replace(cls.of(rows, source, prefix=prefix), notes=notes)

    @property
    def row_lengths(self) -> Tensor:
        """The number of real tokens of each row, int64 [n]."""
        n, longest = self.input_ids.shape
        return torch.full((n,), longest) if self.lengths is None else self.lengths

    @property
    def attention_mask(self) -> Tensor:
        """1 for real tokens and 0 for padding, int64 [n, len]."""
        columns = torch.arange(self.input_ids.shape[1])
        return (columns < self.row_lengths[:, None]).long()

    @property
    def n_tokens(self) -> int:
        """How many real tokens there are."""
        return int(self.row_lengths.sum())

    def select(self, rows: Sequence[int]) -> "Tokens":
        """The rows of these numbers, in this order."""
        index = torch.tensor(rows, dtype=torch.int64)
        mask = None if self.lengths is None else self.attention_mask[index]
        selected = Tokens.of(self.input_ids[index], self.source, mask, self.prefix)
        return replace(selected, notes=self.notes)

    def crop(self, length: int) -> "Tokens":
        """The first ``length`` tokens of each row."""
        mask = None if self.lengths is None else self.attention_mask[:, :length]
        cropped = Tokens.of(self.input_ids[:, :length], self.source, mask, self.prefix)
        return replace(cropped, notes=self.notes)

    def batches(self, max_tokens: int) -> tuple[Batch, ...]:
        """All rows in batches of at most ``max_tokens`` tokens, or of one row. Rows of a batch have one
        length, so that a model needs no mask; the longest come first, those of one length in their order."""
        lengths = self.row_lengths
        batches = []
        for length in sorted(set(lengths.tolist()), reverse=True):
            rows = (lengths == length).nonzero()[:, 0]
            for part in rows.split(max(1, max_tokens // length)):
                batches.append(Batch(part, self.input_ids[part, :length]))
        return tuple(batches)

    def rows(self) -> list[Tensor]:
        """The real tokens of each row, int64 [its length]."""
        lengths = self.row_lengths.tolist()
        return [row[:length] for row, length in zip(self.input_ids, lengths, strict=True)]

    def row_keys(self) -> list[bytes]:
        """The real tokens of each row, to compare."""
        return [row.numpy().tobytes() for row in self.rows()]

    def row_hashes(self) -> list[str]:
        """A short hash of each row, to tell whether two sets share any."""
        return [hashlib.sha256(key).hexdigest()[:12] for key in self.row_keys()]

    def record(self, rows: bool = True) -> TextRecord:
        """What a run's record keeps of its data, with or without the hash of each row."""
        n, length = self.input_ids.shape
        hashes = tuple(self.row_hashes()) if rows else None
        return TextRecord(self.source, n, length, self.sha256, hashes, self.n_tokens, self.prefix)


class LanguageModel(Protocol):
    """What making token ids needs of a model."""

    @property
    def config(self) -> Any:
        """The transformers config."""
        ...

    @property
    def vocabulary(self) -> int:
        """Rows of the input embedding."""
        ...

    @property
    def tokenizer(self) -> Any | None:
        """The tokenizer, or None where there is none."""
        ...

    @property
    def precision(self) -> torch.dtype:
        """What it writes text in."""
        ...

    def loaded(self) -> Any:
        """The whole model in memory, ready to run."""
        ...


def seed_stream(seed: int, purpose: str) -> int:
    """A seed of its own for each purpose, so that calibration and evaluation never share text."""
    digest = hashlib.sha256(f"{purpose}:{seed}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def context_length(config: Any) -> int | None:
    """The longest sequence the model was made for, or None where its config sets no limit."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def bos_token(config: Any) -> int | None:
    """The token that texts begin with by a transformers config (the first of several), or None."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    bos = getattr(text, "bos_token_id", None)
    if isinstance(bos, list | tuple):
        bos = bos[0] if bos else None
    return bos if isinstance(bos, int) else None
