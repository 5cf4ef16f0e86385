"""Files that appear whole or not at all, and where they may be written."""

import os
import tempfile
from pathlib import Path

from srcr.errors import InputError

#: Bytes that a file system takes in a name.
LONGEST_NAME = 255


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it appears whole or not at all; half a surrogate pair becomes "?"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(text.encode(errors="replace"))
    partial.replace(path)


def check_parent(out: Path) -> None:
    """Refuse a path without a name, or whose folder cannot be made.

    Raises:
        InputError: it is empty, "." or "..", or the root; its name is too long; a file stands where its
            folder would be; nothing can be written there.
    """
    if out.name in ("", ".."):
        raise InputError(f"output {str(out)!r} has no name of its own: give that of something new")
    longest = LONGEST_NAME - len(".replaced")
    if len(os.fsencode(out.name)) > longest:
        raise InputError(
            f"output name {out.name[:40]!r}... has {len(os.fsencode(out.name))} bytes: a name may have "
            f"{longest}, so that what is written beside it can be named too"
        )
    parent = next(path for path in out.resolve().parents if path.exists())
    if not parent.is_dir():
        raise InputError(f"output {out}: {parent} is a file, not a folder")
    try:  # permissions do not tell whether a file system takes files
        with tempfile.TemporaryDirectory(prefix=".srcr-", dir=parent):
            pass
    except OSError as error:
        raise InputError(
            f"output {out}: nothing can be written into {parent} ({error.strerror}): choose another place"
        ) from None


def check_new_file(out: Path, overwrite: bool) -> None:
    """Refuse, before any work, a file that could not be written or would replace another unasked.

    Raises:
        InputError: names the path and the remedy.
    """
    if out.is_dir():
        raise InputError(f"output {out} is a folder: give the name of a file")
    if out.exists() and not overwrite:
        raise InputError(f"output {out} exists: choose another name, or use --overwrite")
    check_parent(out)
