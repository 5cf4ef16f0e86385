"""A source of text becomes token ids [n, len].

Sources: ``bundled``, ``self`` (the model writes its own text), a ``.txt``, ``.jsonl`` (field ``text``) or
``.parquet`` (column ``text``) file, a ``.safetensors`` file with an int64 tensor ``input_ids`` [n, len],
``hf:NAME[:CONFIG[:SPLIT[:COLUMN]]]``, a dataset of the Hugging Face hub (or a local folder); and in memory a
list of strings, a ``datasets.Dataset`` with a column ``text``, or token ids int64 [n, len].
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from srcr.data.documents import dataset_documents, list_documents, read_documents
from srcr.data.sampling import OnProgress, no_progress, sample
from srcr.data.tokens import LanguageModel, Tokens, context_length, seed_stream
from srcr.errors import InputError

Purpose = Literal["calibration", "evaluation"]

#: Sequences taken where no number is given.
CALIBRATION_SAMPLES, EVALUATION_SAMPLES = 128, 64


#: A source of text as a run takes it: its name, or texts or token ids in memory.
Source = Any


@dataclass(frozen=True)
class Calibration:
    """Where calibration data comes from. ``source``: a name, or texts or token ids in memory (see
    :mod:`srcr.data.sources`); ``samples`` None: 128 (or all of fewer token ids).

    >>> Calibration("wiki.txt", samples=64).seq_len
    512
    """

    source: Source = "self"
    samples: int | None = None
    seq_len: int = 512

    @classmethod
    def of(cls, source: "Calibration | Source") -> "Calibration":
        """A calibration as it is; any other source with the defaults."""
        return source if isinstance(source, cls) else cls(source)


@dataclass(frozen=True)
class EvaluationText:
    """The text to compare on, as :class:`Calibration`; by default the base writes it, from another seed
    stream than calibration's. ``samples`` None: 64."""

    source: Source = "self"
    samples: int | None = None
    seq_len: int = 512

    @classmethod
    def of(cls, source: "EvaluationText | Source") -> "EvaluationText":
        """A text as it is; any other source with the defaults."""
        return source if isinstance(source, cls) else cls(source)


@dataclass(frozen=True)
class TextRequest:
    """``samples`` sequences (None: ``default_samples``, or all of fewer token ids) of at most ``seq_len``
    tokens from ``source``, for a ``purpose``."""

    source: Any
    samples: int | None
    seq_len: int
    default_samples: int
    purpose: Purpose
    seed: int

    @property
    def name(self) -> str:
        """The source as a record names it."""
        if isinstance(self.source, str):
            return self.source
        if hasattr(self.source, "column_names"):
            return "a dataset in memory"
        return "token ids in memory" if _is_ids(self.source) else "texts in memory"


def calibration_request(calibration: Calibration, seed: int) -> TextRequest:
    """What a calibration asks for."""
    return TextRequest(
        calibration.source, calibration.samples, calibration.seq_len, CALIBRATION_SAMPLES,
        "calibration", seed,
    )  # fmt: skip


def evaluation_request(text: EvaluationText, seed: int) -> TextRequest:
    """What an evaluation asks for."""
    return TextRequest(
        text.source, text.samples, text.seq_len, EVALUATION_SAMPLES, "evaluation", seed
    )


def load_tokens(
    request: TextRequest, model: LanguageModel, on_progress: OnProgress = no_progress
) -> Tokens:
    """Token ids of a request, never longer than the model's context.

    Raises:
        InputError: the source is missing, empty, too short, has the wrong columns, or holds ids
            outside the model's vocabulary.
    """
    if isinstance(request.source, Tokens):
        return check_tokens(request.source, model)
    if request.samples is not None and request.samples < 1:
        raise InputError(f"samples {request.samples} must be at least 1")
    if request.seq_len < 2:
        raise InputError(
            f"seq-len {request.seq_len} must be at least 2: one token to predict from one"
        )
    limit = context_length(model.config)
    length = min(request.seq_len, limit) if limit else request.seq_len
    samples = request.samples if request.samples is not None else request.default_samples
    if isinstance(request.source, str) and request.source == "self":
        seed = seed_stream(request.seed, request.purpose)
        ids = sample(model.loaded(), samples, length, seed, on_progress)
    elif _is_ids(request.source) or _is_tensor_file(request.source):
        ids = _rows(request, length)
    else:
        ids = _tokenize(request, model.tokenizer, samples, length)
    _check_vocabulary(ids, model.vocabulary, request.name)
    return Tokens.of(ids, request.name)


def check_tokens(tokens: Tokens, model: LanguageModel) -> Tokens:
    """The same token ids, which the model can be given.

    Raises:
        InputError: they are not int64 [n, len], too few, longer than the model's context, or outside its
            vocabulary.
    """
    _check_shape(tokens.input_ids, tokens.source)
    _check_vocabulary(tokens.input_ids, model.vocabulary, tokens.source)
    limit, length = context_length(model.config), tokens.input_ids.shape[1]
    if limit is not None and length > limit:
        raise InputError(
            f"{tokens.source}: rows of {length} tokens are longer than the model's context of {limit}"
        )
    return tokens


def _check_shape(ids: Tensor, name: str) -> None:
    if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise InputError(
            f"{name}: input_ids must be int64 [n, len], got {ids.dtype} {list(ids.shape)}"
        )
    if ids.shape[0] == 0 or ids.shape[1] < 2:
        raise InputError(f"{name}: input_ids {list(ids.shape)} holds too little to predict")


def _check_vocabulary(ids: Tensor, vocabulary: int, name: str) -> None:
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= vocabulary:
        wrong = lowest if lowest < 0 else highest
        raise InputError(
            f"{name} holds the token id {wrong}, outside the model's vocabulary of {vocabulary}: "
            "was it tokenized for another model?"
        )


def _is_tensor_file(source: Any) -> bool:
    return isinstance(source, str) and source.endswith(".safetensors")


def _is_ids(source: Any) -> bool:
    """Whether a source in memory is token ids: a tensor, or lists of integers."""
    if isinstance(source, Tensor):
        return True
    rows = source if isinstance(source, list | tuple) else []
    return len(rows) > 0 and isinstance(rows[0], list | tuple)


def _rows(request: TextRequest, length: int) -> Tensor:
    """Rows of token ids, cropped to ``length``."""
    name, samples = request.name, request.samples
    ids = _read_ids(Path(request.source)) if isinstance(request.source, str) else request.source
    try:
        ids = torch.as_tensor(ids)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: input_ids must be int64 [n, len]: {error}") from None
    _check_shape(ids, name)
    if samples is not None and ids.shape[0] < samples:
        raise InputError(
            f"{name} has {ids.shape[0]} sequences, {samples} were asked for: use --samples "
            f"{ids.shape[0]} or a longer file"
        )
    rows: Tensor = ids.cpu()[: samples or request.default_samples, :length]
    return rows.to(torch.int64)


def _read_ids(path: Path) -> Any:
    """The tensor ``input_ids`` of a file."""
    if not path.is_file():
        raise InputError(f"text file {path} does not exist")
    try:
        with safe_open(path, framework="pt") as stream:
            names = list(stream.keys())
            if "input_ids" not in names:
                raise InputError(
                    f"{path} has no tensor 'input_ids', only {', '.join(names) or 'none'}"
                )
            return stream.get_tensor("input_ids")
    except SafetensorError as error:
        raise InputError(f"{path} is not a valid safetensors file: {error}") from None


def _tokenize(request: TextRequest, tokenizer: Any | None, samples: int, length: int) -> Tensor:
    """Documents tokenized in their order (each with the special tokens its tokenizer adds) and cut into
    rows [samples, length]; reading stops when there are enough."""
    if tokenizer is None:
        raise InputError(
            f"text source {request.name!r} is text, but the model has no tokenizer: use 'self' or a "
            ".safetensors file of input_ids"
        )
    stream: list[int] = []
    for text in _documents(request):
        stream.extend(tokenizer(text, verbose=False)["input_ids"])
        if len(stream) >= samples * length:
            break
    full = len(stream) // length
    if full < samples:
        remedy = f"use --samples {full}, a shorter --seq-len" if full else "use a shorter --seq-len"
        raise InputError(
            f"{request.name} gives {len(stream)} tokens, enough for {full} sequences of {length}; {samples} "
            f"were asked for: {remedy} or more text"
        )
    return torch.tensor(stream[: samples * length], dtype=torch.long).view(samples, length)


def _documents(request: TextRequest) -> Iterable[str]:
    source = request.source
    if isinstance(source, str):
        return read_documents(source, request.seed, request.purpose)
    if hasattr(source, "column_names"):
        return dataset_documents(source)
    if isinstance(source, list | tuple):
        return list_documents(source)
    raise InputError(
        f"text source of type {type(source).__name__} is not known: give a name, a list of strings, a "
        "datasets.Dataset with a column 'text', or token ids [n, len]"
    )
