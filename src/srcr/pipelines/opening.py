"""The model that a pipeline is given, and the text that it may write itself."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from srcr.data.sampling import OnProgress, sampling_memory
from srcr.data.sources import TextRequest, load_tokens
from srcr.data.specs import Calibration
from srcr.data.text_cache import TextCache
from srcr.data.tokens import Tokens
from srcr.environment import cache_folder, versions
from srcr.errors import first_line
from srcr.models.blockwise import copy_on, running_precision
from srcr.models.checkpoint import ModelLike, OpenModel, open_model
from srcr.pipelines.options import RunOptions
from srcr.pipelines.progress import Bar, say, stage
from srcr.pipelines.refusals import check_original, check_run


def open_with_bar(model: ModelLike, options: RunOptions) -> OpenModel:
    """The open model, with a bar while it is opened."""
    with stage("load", 1, options.quiet) as bar:
        opened = open_model(model)
        bar.note(opened.name, advance=1)
    return opened


def open_original(model: ModelLike, options: RunOptions) -> OpenModel:
    """The open model, which is to be compressed.

    Raises:
        InputError: as :func:`open_model`, :func:`check_run` and :func:`check_original`.
    """
    check_run(options)
    check_original(model, options)
    return open_with_bar(model, options)


def writes_itself(calibration: Calibration) -> bool:
    """Whether the model writes the text, which takes all of it."""
    return isinstance(calibration.source, str) and calibration.source == "self"


@dataclass(frozen=True, eq=False)
class TextModel:
    """A :class:`~srcr.data.tokens.LanguageModel` that writes text on the ``device`` that is worked on: on a
    GPU in its own precision, as fast as it goes there, on a CPU in that of the blocks. ``model``: the same on
    the device, where it is loaded already, taken if it has that precision."""

    opened: OpenModel
    device: str
    model: Any = None

    @property
    def config(self) -> Any:
        """The transformers config."""
        return self.opened.config

    @property
    def vocabulary(self) -> int:
        """Rows of the input embedding."""
        return self.opened.vocabulary

    @property
    def tokenizer(self) -> Any | None:
        """The tokenizer, or None where there is none."""
        return self.opened.tokenizer

    @property
    def precision(self) -> torch.dtype:
        """What it writes in."""
        if self.device != "cpu":
            return self.opened.dtype
        return running_precision(self.opened.dtype, torch.device(self.device))

    def loaded(self) -> Any:
        """The whole model on the device."""
        if self.model is not None and self.model.dtype == self.precision:
            return self.model
        return copy_on(self.opened.stacked(self.precision), self.device)


def writing_memory(model: TextModel, length: int) -> int:
    """Bytes that a model takes which is loaded whole and writes rows of so many tokens."""
    opened, precision = model.opened, model.precision
    weights = precision.itemsize * opened.parameters
    loading = opened.weight_bytes if precision != opened.dtype else 0
    return weights + max(
        loading, sampling_memory(opened.config, opened.vocabulary, length, precision)
    )


def load_text(request: TextRequest, model: TextModel, title: str, options: RunOptions) -> Tokens:
    """The token ids of a request, with a bar of that title while the model writes them.

    Raises:
        InputError: as :func:`srcr.data.sources.load_tokens`.
    """
    aloud: list[str] = []
    with stage(title, 1, options.quiet) as bar:
        bar.note(request.name)
        cache = text_cache(request, model, options, aloud.append)
        tokens = load_tokens(request, model, writing_progress(bar, request.name), cache)
        bar.reach(1, f"{request.name}: {tokens.record(rows=False).size}")
    for note in (*aloud, *tokens.notes):
        say(note, options.quiet)
    return tokens


def writing_progress(bar: Bar, name: str) -> OnProgress:
    """Shows on a bar of length 1 how many tokens are written, and how many a second."""
    started = time.monotonic()

    def report(done: int, total: int) -> None:
        rate = done / max(1e-9, time.monotonic() - started)
        bar.reach(done / total, f"{name}: {done} of {total} tokens, {rate:.0f} a second")

    return report


def text_cache(
    request: TextRequest, model: TextModel, options: RunOptions, say: Callable[[str], None]
) -> TextCache | None:
    """Where the text of a request is kept, if the model writes it; None where ``options`` want none, or the
    model is in memory alone, whose hash would take longer than it saves."""
    opened = model.opened
    if not (request.written and options.cache) or opened.folder is None:
        return None
    try:
        folder = cache_folder() / "text"
    except RuntimeError as error:
        say(f"{request.purpose} text is not kept: {first_line(error)}")
        return None
    writer = {
        "weights": opened.sha256,
        "config": opened.source.config_dict(),
        "architecture": opened.architecture,
        "precision": str(model.precision),
        "device": model.device,
        # How products are summed, and so what is drawn where two tokens are near each other.
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    return TextCache(folder, writer, lambda note: say(f"{request.purpose} {note}"))
