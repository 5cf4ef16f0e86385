"""A source of text becomes token ids [n, len].

Sources: ``bundled``, ``self`` (the model writes its own text), a ``.txt``, ``.jsonl`` or ``.parquet`` file
(a row is a ``text`` or a chat), a ``.safetensors`` file with an int64 tensor ``input_ids`` [n, len] and,
where rows are padded, an ``attention_mask``, ``hf:NAME[:CONFIG[:SPLIT[:COLUMN]]]``, a dataset of the Hugging
Face hub (or a local folder); and in memory a list of strings, a ``datasets.Dataset``, or rows of token ids.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from srcr.data.chat import Document, as_chats
from srcr.data.documents import dataset_documents, list_documents, read_documents
from srcr.data.packing import SpecialTokens, chat_beginning, cut_rows, tokenize
from srcr.data.padding import FEWEST_TOKENS
from srcr.data.sampling import OnProgress, TextPlan, no_progress, write_text
from srcr.data.specs import (
    CALIBRATION_SAMPLES,
    EVALUATION_SAMPLES,
    HELD_OUT_SAMPLES,
    RECOVERY_SAMPLES,
    Calibration,
    EvaluationText,
    RecoveryText,
    check_counts,
)
from srcr.data.text_cache import TextCache
from srcr.data.token_ids import (
    check_tokens,
    check_vocabulary,
    holds_ids,
    read_rows,
    with_prefix,
)
from srcr.data.tokens import LanguageModel, Tokens, bos_token, context_length, seed_stream
from srcr.errors import InputError

#: What is said where text should be chats, and cannot.
NO_TEMPLATE = (
    "text cannot go through the tokenizer's chat template, which it does not have, or which leaves no room: "
    "leave --chat out"
)
Purpose = Literal["calibration", "evaluation", "recovery", "held-out"]


@dataclass(frozen=True)
class TextRequest:
    """``samples`` sequences (None: ``default_samples``, or all where there are fewer) of at most ``seq_len``
    tokens from ``source``, for a ``purpose``; ``chat`` as of a :class:`~srcr.data.specs.Calibration`."""

    source: Any
    samples: int | None
    seq_len: int
    default_samples: int
    purpose: Purpose
    seed: int
    chat: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.source, Path):
            object.__setattr__(self, "source", str(self.source))

    @property
    def written(self) -> bool:
        """Whether the model writes the text itself."""
        return isinstance(self.source, str) and self.source == "self"

    @property
    def name(self) -> str:
        """The source as a record names it."""
        if isinstance(self.source, str):
            return self.source
        if hasattr(self.source, "column_names"):
            return "a dataset in memory"
        return "token ids in memory" if holds_ids(self.source) else "texts in memory"


def calibration_request(calibration: Calibration, seed: int) -> TextRequest:
    """What a calibration asks for."""
    return TextRequest(
        calibration.source, calibration.samples, calibration.seq_len, CALIBRATION_SAMPLES,
        "calibration", seed, calibration.chat,
    )  # fmt: skip


def evaluation_request(text: EvaluationText, seed: int) -> TextRequest:
    """What an evaluation asks for."""
    return TextRequest(
        text.source, text.samples, text.seq_len, EVALUATION_SAMPLES, "evaluation", seed, text.chat
    )


def recovery_requests(text: RecoveryText, seed: int) -> list[TextRequest]:
    """What a recovery asks for to train on, a request for each source.

    Raises:
        InputError: fewer samples than sources.
    """
    count = len(text.sources)
    if text.samples is not None and text.samples < count:
        raise InputError(f"samples {text.samples} must be at least {count}, one of each source")
    parts = [
        None if text.samples is None else (text.samples + i) // count
        for i in reversed(range(count))
    ]
    default = RECOVERY_SAMPLES // max(1, count)
    return [
        TextRequest(source, part, text.seq_len, default, "recovery", seed, text.chat)
        for source, part in zip(text.sources, parts, strict=True)
    ]


def held_out_request(text: RecoveryText, seed: int) -> TextRequest:
    """What a recovery asks for to choose and to measure by."""
    return TextRequest(
        text.held_out, None, text.seq_len, HELD_OUT_SAMPLES, "held-out", seed, text.chat
    )


def load_tokens(
    request: TextRequest,
    model: LanguageModel,
    on_progress: OnProgress = no_progress,
    cache: TextCache | None = None,
) -> Tokens:
    """Token ids of a request, never longer than the model's context. What the model writes itself is kept in
    the ``cache``.

    Raises:
        InputError: the source is missing, empty, too short, has the wrong columns, or holds ids
            outside the model's vocabulary.
    """
    if isinstance(request.source, Tokens):
        return check_tokens(request.source, model)
    check_counts(request.samples, request.seq_len)
    limit = context_length(model.config)
    length = min(request.seq_len, limit) if limit else request.seq_len
    if request.written:
        tokens = _write(request, model, length, on_progress, cache)
    elif holds_ids(request.source):
        rows = read_rows(request.source, request.name, request.samples, request.default_samples)
        tokens = rows.crop(length)
    else:
        return _pack(request, model, length)
    check_vocabulary(tokens, model.vocabulary)
    return with_prefix(tokens, model.config)


def _write(
    request: TextRequest,
    model: LanguageModel,
    length: int,
    on_progress: OnProgress,
    cache: TextCache | None,
) -> Tokens:
    """What the model writes itself, from what its tokenizer puts before a text, else from the config's BOS
    token; without one from a token drawn at random (as in LLM-QAT, arXiv 2305.17888, section 2.1). Where the
    tokenizer has a chat template, every other row from where a user's first message begins, so that the model
    writes both sides of a chat (as in Magpie, arXiv 2406.08464)."""
    prefix, beginnings = _beginnings(model, length, request.chat)
    samples = request.default_samples if request.samples is None else request.samples
    plan = TextPlan(samples, length, seed_stream(request.seed, request.purpose), beginnings)
    ids = write_text(model, plan, on_progress, cache)
    everywhere = all(begin[: len(prefix)] == prefix for begin in beginnings)
    return Tokens.of(ids, request.name, prefix=prefix if everywhere else ())


def _beginnings(
    model: LanguageModel, length: int, chat: bool | None
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """What the model's tokenizer puts before a text; and what rows of ``length`` tokens begin with in turn:
    chats alone, no chats, or (None) both.
    What the model does not know, or what leaves too little of a row, counts as nothing, and so does all of a
    tokenizer that cannot be loaded: nothing else is needed of it here."""
    try:
        tokenizer = model.tokenizer
    except InputError:
        tokenizer = None
    prefix: tuple[int, ...] = ()
    turn: tuple[int, ...] = ()
    if tokenizer is not None:
        prefix = SpecialTokens.of(tokenizer).prefix
        turn = () if chat is False else chat_beginning(tokenizer)
    if len(prefix) >= length or not _known(prefix, model):
        prefix = ()
    if 2 * len(turn) > length or not _known(turn, model):
        turn = ()
    if chat:
        if not turn:
            raise InputError(NO_TEMPLATE)
        return prefix, (turn,)
    bos = bos_token(model.config)
    begin = prefix or (() if bos is None or not _known((bos,), model) else (bos,))
    return prefix, tuple(beginning for beginning in (begin, turn) if beginning)


def _known(ids: tuple[int, ...], model: LanguageModel) -> bool:
    """Whether token ids are in the model's vocabulary."""
    return all(0 <= token < model.vocabulary for token in ids)


def _pack(request: TextRequest, model: LanguageModel, length: int) -> Tokens:
    """Documents in their order, in rows that each begin with what the tokenizer puts before a text; reading
    stops when there are enough."""
    tokenizer, name = model.tokenizer, request.name
    if tokenizer is None:
        raise InputError(
            f"text source {name!r} is text, but the model has no tokenizer: use 'self' or a "
            ".safetensors file of input_ids"
        )
    special = SpecialTokens.of(tokenizer)
    samples = request.default_samples if request.samples is None else request.samples
    if request.chat and not getattr(tokenizer, "chat_template", None):
        raise InputError(NO_TEMPLATE)
    documents = as_chats(_documents(request), request.chat, name)
    stream = tokenize(documents, tokenizer, special, samples * length)
    rows = cut_rows(stream.ids, special.prefix, length)
    full = [row for row in rows if len(row) == length][:samples]
    if request.samples is not None and len(full) < samples:
        count = len(full)
        remedy = (
            f"use --samples {count}, a shorter --seq-len" if full else "use a shorter --seq-len"
        )
        raise InputError(
            f"{name} gives {len(stream.ids)} tokens, enough for {count} sequences of {length}; {samples} "
            f"were asked for: {remedy} or more text"
        )
    rows = full or rows
    if not rows or len(rows[0]) < FEWEST_TOKENS:
        raise InputError(
            f"{name} gives {len(stream.ids)} tokens, too little to predict: use more text"
        )
    tokens = Tokens.of(rows, name, prefix=special.prefix)
    check_vocabulary(tokens, model.vocabulary)
    return replace(tokens, notes=_notes(request, tokens, stream.joined))


def _notes(request: TextRequest, tokens: Tokens, joined: bool) -> tuple[str, ...]:
    """What people should know of packed text."""
    notes = []
    count, length = tokens.input_ids.shape
    if request.samples is None and count < request.default_samples:
        sequences = "sequence" if count == 1 else "sequences"
        notes.append(
            f"{request.name} gives {count} {sequences} of {length} tokens, fewer than the "
            f"{request.default_samples} taken by default"
        )
    if joined and request.chat is None:
        notes.append(
            f"{request.name} holds chats, and the tokenizer has no chat template: their messages were "
            "joined by blank lines"
        )
    return tuple(notes)


def _documents(request: TextRequest) -> Iterable[Document]:
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
