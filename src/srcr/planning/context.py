"""What sensitivity, plan and search work on."""

from dataclasses import dataclass, replace
from typing import Any

from srcr.data.sampling import OnProgress, no_progress
from srcr.data.sources import calibration_request, load_tokens
from srcr.data.specs import CALIBRATION_SAMPLES, Calibration
from srcr.data.splits import CHOICE, TEST, Splits, search_sequences, split_tokens
from srcr.data.text_cache import TextCache
from srcr.data.token_ids import holds_ids
from srcr.data.tokens import LanguageModel
from srcr.errors import InputError
from srcr.models.blockwise import BlockwiseModel
from srcr.models.checkpoint import OpenModel
from srcr.models.topology import LinearGroup, Topology


@dataclass(frozen=True, eq=False)
class SearchContext:
    """An open model, the same on the device that is worked on (``blocks``), the four parts of its text, the
    seed, the ``groups`` of linears that get a level, and the ``base`` whole in float32 where it is needed: it
    is loaded once, and not again while this holds it."""

    opened: OpenModel
    blocks: BlockwiseModel
    splits: Splits
    seed: int
    groups: tuple[LinearGroup, ...]
    base: Any = None

    @property
    def topology(self) -> Topology:
        """Blocks, groups of linears, shapes."""
        return self.opened.topology

    @property
    def device(self) -> str:
        """The kind of device: cpu or cuda."""
        return self.blocks.device.type


def load_splits(
    calibration: Calibration,
    model: LanguageModel,
    parameters: int,
    seed: int,
    on_progress: OnProgress = no_progress,
    cache: TextCache | None = None,
) -> Splits:
    """The four parts of a calibration's source, for a model of so many parameters. The first is what
    ``compress`` would calibrate on.

    Raises:
        InputError: as :func:`srcr.data.sources.load_tokens`; too few different sequences.
    """
    first = CALIBRATION_SAMPLES if calibration.samples is None else calibration.samples
    if first < 1:
        raise InputError(f"samples {first} must be at least 1")
    search = search_sequences(parameters)
    others = search + CHOICE + TEST
    request = replace(
        calibration_request(calibration, seed), samples=None, default_samples=first + others
    )
    tokens = load_tokens(request, model, on_progress, cache)
    n = len(tokens.input_ids)
    if calibration.samples is not None and n < first + others and not holds_ids(calibration.source):
        remedy = f"use --samples {n - others}" if n > others else "leave --samples out"
        raise InputError(
            f"{request.name} gives {n} sequences; {first} to calibrate on were asked for, and {others} more "
            f"are to search, choose and measure on: {remedy}, a shorter --seq-len or more text"
        )
    return split_tokens(tokens, first, search)
