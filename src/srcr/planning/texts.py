"""One source of text, cut into four that share no sequence: to calibrate, search, choose, measure."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from srcr.calibration import Tokens, load_tokens
from srcr.compression import DEFAULT_SAMPLES, Calibration
from srcr.errors import InputError
from srcr.models.load import load_tokenizer

#: Sequences to search on at least, to choose on, and to measure on.
SEARCH, CHOICE, TEST = 12, 64, 64
#: Parameters below which a model is searched on more sequences, up to twice as many: they cost little there.
SMALL = 2_000_000
#: Where a file has too few: this part of its sequences calibrates, the others share the rest.
SHARE = 0.4


@dataclass(frozen=True)
class Texts:
    """The four parts, in the order of the source."""

    calibration: Tokens
    search: Tokens
    choice: Tokens
    test: Tokens

    def parts(self) -> tuple[Tokens, ...]:
        """All four."""
        return self.calibration, self.search, self.choice, self.test


def search_sequences(parameters: int) -> int:
    """On how many sequences the candidates of a model of this size are measured."""
    return max(SEARCH, min(2 * SEARCH, SEARCH * SMALL // parameters))


def load_texts(
    calibration: Calibration,
    model: Any,
    folder: Path,
    seed: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Texts:
    """The four texts. The first part is what ``srcr compress`` would calibrate on.

    Raises:
        InputError: as :func:`srcr.calibration.load_tokens`; fewer than eight sequences.
    """
    first = calibration.samples or DEFAULT_SAMPLES
    search = search_sequences(sum(p.numel() for p in model.parameters()))
    total = first + search + CHOICE + TEST
    fixed = calibration.source.endswith(".safetensors")
    tokens = load_tokens(
        calibration.source, model, load_tokenizer(folder), None if fixed else total, calibration.seq_len,
        seed, "calibration", total, on_progress,
    )  # fmt: skip
    ids = tokens.input_ids
    if len(ids) < 8:
        raise InputError(
            f"{calibration.source} has {len(ids)} sequences: a search calibrates, searches, chooses and "
            "measures on different ones, and needs at least 8"
        )
    sizes = [first, search, CHOICE, TEST]
    if len(ids) < total:
        sizes[0] = min(first, int(SHARE * len(ids)))
        sizes[1:] = [(len(ids) - sizes[0]) // 3] * 3
    parts = []
    for rows in torch.split(ids[: sum(sizes)], sizes):
        part = rows.contiguous()
        parts.append(
            Tokens(part, tokens.source, hashlib.sha256(part.numpy().tobytes()).hexdigest())
        )
    return Texts(*parts)
