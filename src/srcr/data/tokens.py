"""Token ids, and what a run needs of a model to make them."""

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from srcr.records.run import TextRecord


@dataclass(frozen=True, eq=False)
class Tokens:
    """``input_ids`` int64 [n, len], where they come from, and a hash of them."""

    input_ids: Tensor
    source: str
    sha256: str

    @classmethod
    def of(cls, input_ids: Tensor, source: str = "token ids") -> "Tokens":
        """Token ids with their hash."""
        ids = input_ids.to(torch.int64).contiguous()
        return cls(ids, source, hashlib.sha256(ids.numpy().tobytes()).hexdigest())

    def record(self, rows: bool = True) -> TextRecord:
        """What a run's record keeps of its data, with or without the hash of each row."""
        n, length = self.input_ids.shape
        hashes = tuple(self.row_hashes()) if rows else None
        return TextRecord(self.source, n, length, self.sha256, hashes)

    def row_hashes(self) -> list[str]:
        """A short hash of each sequence, to tell whether two sets share any."""
        return [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:12] for row in self.input_ids]


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
