"""The model that a pipeline is given, and the text that it may write itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srcr.data.sources import Calibration
from srcr.models.blockwise import copy_on
from srcr.models.checkpoint import ModelLike, OpenModel, open_model
from srcr.models.load import resolve
from srcr.pipelines.options import Output, RunOptions
from srcr.pipelines.progress import stage
from srcr.storage.atomic import check_output


def open_with_bar(model: ModelLike, options: RunOptions) -> OpenModel:
    """The open model, with a bar while it is opened."""
    with stage("load", 1, options.quiet) as bar:
        opened = open_model(model)
        bar.note(opened.name, advance=1)
    return opened


def open_for(output: Output, model: ModelLike, options: RunOptions) -> OpenModel:
    """The open model whose result will be ``output``, which is checked first: opening may take long.

    Raises:
        InputError: as :func:`open_model` and :func:`check_output`.
    """
    named = model[0] if isinstance(model, tuple) else model  # a pair with its tokenizer
    folder = resolve(named) if isinstance(named, str | Path) else getattr(named, "folder", None)
    check_output(output.folder, folder, output.overwrite, output.resume)
    return open_with_bar(model, options)


def writes_itself(calibration: Calibration) -> bool:
    """Whether the model writes the text, which takes all of it."""
    return isinstance(calibration.source, str) and calibration.source == "self"


@dataclass(frozen=True, eq=False)
class TextModel:
    """A :class:`~srcr.data.tokens.LanguageModel` that writes text on the ``device`` that is worked on: on a
    GPU in its own precision, as fast as it goes there; or, where it is given, as ``model`` does."""

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

    def loaded(self) -> Any:
        """The whole model on the device."""
        if self.model is not None:
            return self.model
        if self.device == "cpu":
            return self.opened.loaded()
        return copy_on(self.opened.loaded(self.opened.dtype), self.device)
