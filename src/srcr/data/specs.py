"""What text is asked for: where it comes from, and how much of it. Nothing is read here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srcr.errors import InputError

#: Files of text by the end of their names, and of token ids.
TEXT_FILES, ID_FILE = (".txt", ".jsonl", ".parquet"), ".safetensors"
#: Sequences taken where no number is given.
CALIBRATION_SAMPLES, EVALUATION_SAMPLES, RECOVERY_SAMPLES, HELD_OUT_SAMPLES = 128, 64, 512, 64


#: A source of text as a run takes it: its name, or texts or token ids in memory.
Source = Any


@dataclass(frozen=True)
class Calibration:
    """Where calibration data comes from. ``source``: a name, or texts or token ids in memory (see
    :mod:`srcr.data.sources`); ``samples`` None: 128, or all where there are fewer. ``chat``: whether text
    goes through the tokenizer's chat template, plain text as a user's message, and the model writes nothing
    but chats (None: chats do, and of what the model writes half are chats; False: nothing does).

    >>> Calibration("wiki.txt", samples=64).seq_len
    512
    """

    source: Source = "self"
    samples: int | None = None
    seq_len: int = 512
    chat: bool | None = None

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
    chat: bool | None = None

    @classmethod
    def of(cls, source: "EvaluationText | Source") -> "EvaluationText":
        """A text as it is; any other source with the defaults."""
        return source if isinstance(source, cls) else cls(source)


@dataclass(frozen=True)
class RecoveryText:
    """The text that a recovery trains on, an equal part from each of the ``sources`` (see
    :class:`Calibration`), ``samples`` rows in all (None: 512, or all where there are fewer); and the source
    of 64 more rows that are ``held_out``, to choose and to measure by: better another than what is trained
    on.

    >>> RecoveryText(("self", "wiki.txt"), samples=256).held_out
    'self'
    """

    sources: tuple[Source, ...] = ("self",)
    samples: int | None = None
    seq_len: int = 512
    held_out: Source = "self"
    chat: bool | None = None

    @classmethod
    def of(cls, source: "RecoveryText | Source") -> "RecoveryText":
        """A text as it is; any other source with the defaults."""
        return source if isinstance(source, cls) else cls((source,))


def check_text(text: Calibration | EvaluationText | RecoveryText) -> None:
    """Refuse, before anything is read, text that there cannot be.

    Raises:
        InputError: counts out of range; a source whose name is not known, or whose file is missing.
    """
    check_counts(text.samples, text.seq_len)
    sources = (*text.sources, text.held_out) if isinstance(text, RecoveryText) else (text.source,)
    for source in sources:
        if isinstance(source, str | Path):
            check_source(str(source))


def check_calibration(calibration: "Calibration | Source") -> None:
    """:func:`check_text` of what a calibration may be: a :class:`Calibration`, or any other source.

    Raises:
        InputError: as :func:`check_text`.
    """
    if isinstance(calibration, Calibration | str | Path):
        check_text(Calibration.of(calibration))


def check_counts(samples: int | None, seq_len: int) -> None:
    """Refuse counts that give no text to predict.

    Raises:
        InputError: names the one that is too small.
    """
    if samples is not None and samples < 1:
        raise InputError(f"samples {samples} must be at least 1")
    if seq_len < 2:
        raise InputError(f"seq-len {seq_len} must be at least 2: one token to predict from one")


def check_source(name: str) -> None:
    """Refuse the name of a source that cannot be.

    Raises:
        InputError: it is not known, or names a file that is not there.
    """
    if name in ("bundled", "self") or name.startswith("hf:"):
        return
    if not name.endswith((*TEXT_FILES, ID_FILE)):
        raise InputError(
            f"text source {name!r} is not known: use bundled, self, a .txt, .jsonl, .parquet "
            "or .safetensors file, or hf:NAME[:CONFIG[:SPLIT[:COLUMN]]]"
        )
    if not Path(name).is_file():
        raise InputError(f"text file {name} does not exist")
