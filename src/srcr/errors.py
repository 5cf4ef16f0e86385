"""The one hierarchy of errors. Every message says what was wrong, with the value, and what to do."""

import difflib
from collections.abc import Iterable


class SrcrError(Exception):
    """A run failed for a reason srcr can name. The command line exits with 1.

    The message is one line without control characters: names and values in it may be a stranger's.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class InputError(SrcrError):
    """What the user gave cannot be used: option, file, model, plan. The command line exits with 2."""

    exit_code = 2


class NumericalError(SrcrError):
    """Weights, activations or Hessians are not finite, or cannot be factorised."""


class VerificationError(SrcrError):
    """What was written does not read back as what was computed."""


def printable(text: str) -> str:
    """``text`` in one line, what no terminal can show (or what moves its cursor) written as an escape."""
    line = " ".join(text.split())
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def first_line(error: BaseException) -> str:
    """What an exception of another library says first; its type's name if it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def in_one_line(error: BaseException, length: int = 300) -> str:
    """All that an exception of another library says, in one line, cut where it is long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else f"{text[:length]}..."


def nearest(name: str, known: Iterable[str]) -> str:
    """What to use instead of a name that is not known: all there are, and the one that may have been meant.

    >>> nearest("jont", ["joint", "sequential-a"])
    'use joint, sequential-a (did you mean joint?)'
    """
    names = list(known)
    near = difflib.get_close_matches(name.lower(), names, 1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    return f"use {', '.join(names)}{meant}"
