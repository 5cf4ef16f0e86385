"""Text that a model writes itself."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from srcr.data.decoding import Decoder, cache_width
from srcr.data.text_cache import TextCache
from srcr.data.tokens import LanguageModel
from srcr.errors import NumericalError

#: Rows written together at most, and the most bytes that their keys and values may take. No other memory
#: decides it: the text must not depend on what is free.
SAMPLING_ROWS, SAMPLING_CACHE = 128, 2 << 30
#: What keys and values take as a multiple of themselves, and tensors of the size of logits alive at once.
CACHE_COPIES, SAMPLING_ALIVE = 1.25, 3
#: Positions between two reports of progress.
REPORT_EVERY = 8
#: Odds are summed in blocks of so many tokens.
BLOCK = 256

OnProgress = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """Report nothing."""


def sampling_rows(config: Any, length: int, dtype: torch.dtype) -> int:
    """How many rows of ``length`` tokens a model of a transformers config writes together, which decides how
    its products are rounded: a power of two."""
    row = cache_width(config) * length * dtype.itemsize
    rows = min(SAMPLING_ROWS, SAMPLING_CACHE // max(1, row))
    return 1 << max(0, rows.bit_length() - 1)


def sampling_memory(config: Any, vocabulary: int, length: int, dtype: torch.dtype) -> int:
    """Bytes that writing rows of ``length`` tokens takes beside the model: keys and values, and logits."""
    cached = CACHE_COPIES * dtype.itemsize * cache_width(config) * length
    logits = SAMPLING_ALIVE * torch.float32.itemsize * vocabulary
    return int(sampling_rows(config, length, dtype) * (cached + logits))


@dataclass(frozen=True)
class TextPlan:
    """What a model is to write: ``samples`` rows of ``length`` tokens from a ``seed``. They begin with each
    of the ``prefixes`` in turn (none: with a token drawn at random); ``start`` is the number of the first."""

    samples: int
    length: int
    seed: int
    prefixes: tuple[tuple[int, ...], ...]
    start: int = 0

    def batches(self, rows: int) -> list["TextPlan"]:
        """The plan in parts of at most so many rows."""
        return [
            replace(self, samples=min(rows, self.samples - first), start=self.start + first)
            for first in range(0, self.samples, rows)
        ]

    def beginnings(self, vocabulary: int, generator: torch.Generator) -> Tensor:
        """What each row begins with, int64 [samples, tokens], and -1 behind the shorter ones."""
        if not self.prefixes:
            return torch.randint(vocabulary, (self.samples, 1), generator=generator)
        widest = min(max(map(len, self.prefixes)), self.length)
        padded = [(*prefix, *[-1] * widest)[:widest] for prefix in self.prefixes]
        numbers = range(self.start, self.start + self.samples)
        return torch.tensor([padded[number % len(padded)] for number in numbers])


@torch.no_grad()
def write_text(
    model: LanguageModel,
    plan: TextPlan,
    on_progress: OnProgress = no_progress,
    cache: TextCache | None = None,
) -> Tensor:
    """The rows of a plan int64 [samples, length] as the model writes them at temperature 1; what is in the
    cache is not written again, and the model not loaded for it. The global random state is not touched.

    Raises:
        NumericalError: the model's predictions are not finite.
    """
    generator = torch.Generator().manual_seed(plan.seed)
    whole, parts = None, []
    paths: list[Path] = []
    for batch in plan.batches(sampling_rows(model.config, plan.length, model.precision)):
        beginnings = batch.beginnings(model.vocabulary, generator)
        uniform = torch.rand(plan.length, batch.samples, generator=generator, dtype=torch.float64)
        settings = asdict(batch)
        ids = None if cache is None else cache.read(settings, (batch.samples, plan.length))
        if cache is not None and ids is not None:
            paths.append(cache.path(settings))
        else:
            whole = _loaded(model) if whole is None else whole
            report = partial(
                _report, on_progress, batch.start * plan.length, plan.samples * plan.length
            )
            ids = write_rows(whole, beginnings, uniform, report)
            if cache is not None:
                cache.keep(settings, ids)
        parts.append(ids)
    if cache is not None and paths:
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        cache.say(f"text written before: {paths[0]}{more}")
    return torch.cat(parts)


def _report(on_progress: OnProgress, before: int, total: int, tokens: int) -> None:
    on_progress(before + tokens, total)


def _loaded(model: LanguageModel) -> Any:
    """The whole model in the precision that it writes in."""
    whole = model.loaded()
    return whole if whole.dtype == model.precision else copy.deepcopy(whole).to(model.precision)


@torch.no_grad()
def write_rows(
    model: Any,
    beginnings: Tensor,
    uniform: Tensor,
    on_progress: Callable[[int], None] = lambda tokens: None,
) -> Tensor:
    """Rows int64 [n, len] that a transformers model writes together at temperature 1, which begin with
    ``beginnings`` [n, tokens] (-1 behind shorter ones). ``uniform`` float64 [len, n]: the random number, from
    0 to 1, of each token.

    Raises:
        NumericalError: the model's predictions are not finite.
    """
    beginnings = beginnings.to(model.device)
    uniform = uniform.to(model.device)
    ids = beginnings[:, : int((beginnings >= 0).sum(1).min())]
    columns = [ids]
    decoder = Decoder(model, len(uniform))
    for position in range(ids.shape[1], len(uniform)):
        ids = draw(decoder.logits(ids), uniform[position])
        if position < beginnings.shape[1]:
            given = beginnings[:, position, None]
            ids = torch.where(given < 0, ids, given)
        columns.append(ids)
        if position % REPORT_EVERY == 0 or position + 1 == len(uniform):
            on_progress(len(ids) * (position + 1))
    return torch.cat(columns, dim=1).cpu()


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """A token int64 [n, 1] for each row of ``logits`` [n, vocabulary], as likely as they say: where
    ``uniform`` float64 [n], from 0 to 1, falls among the summed odds.

    A random number for every token of a large vocabulary, as in ``torch.multinomial``, takes longer than a
    small model does. Only the block that is met is summed token by token.

    Raises:
        NumericalError: the logits are not finite.
    """
    odds = logits.softmax(-1, dtype=torch.float32)
    missing = -odds.shape[-1] % BLOCK
    padded = functional.pad(odds, (0, missing)) if missing else odds
    blocks = padded.view(len(odds), -1, BLOCK)
    masses = blocks.sum(-1).double()
    sums = masses.cumsum(-1)
    if not bool(torch.isfinite(sums[:, -1]).all()):
        raise NumericalError(
            "the model's own predictions are not finite, so it cannot write text: check it, or give another "
            "source"
        )
    wanted = uniform[:, None] * sums[:, -1:]
    block = torch.searchsorted(sums, wanted, right=True).clamp_max(sums.shape[-1] - 1)
    mass = masses.gather(-1, block)
    share = (wanted - (sums.gather(-1, block) - mass)) / mass
    inside = (
        blocks[torch.arange(len(blocks), device=blocks.device), block[:, 0]].double().cumsum(-1)
    )
    place = torch.searchsorted(inside, share.clamp(0, 1) * inside[:, -1:], right=True)
    # Rounding may put the number behind the last token that has odds.
    last = (inside < inside[:, -1:]).sum(-1, keepdim=True)
    return block * BLOCK + torch.minimum(place, last)
