"""The files of a compressed folder by name, and how a file is written so that nothing is lost."""

from pathlib import Path

from srcr.errors import InputError

RECORD = "srcr.json"
PLAN = "plan.yaml"
CARD = "README.md"
EVALUATION = "evaluation.json"
REPORT = "report.html"
SEARCH = "search.json"


def check_place(out: Path) -> None:
    """Refuse a path whose folder cannot be made.

    Raises:
        InputError: a file stands where its folder would be.
    """
    parent = next(path for path in out.resolve().parents if path.exists())
    if not parent.is_dir():
        raise InputError(f"output {out}: {parent} is a file, not a folder")


def check_new_file(out: Path, overwrite: bool) -> None:
    """Refuse, before any work, a file that could not be written or would replace another unasked.

    Raises:
        InputError: names the path and the remedy.
    """
    if out.is_dir():
        raise InputError(f"output {out} is a folder: give the name of a file")
    if out.exists() and not overwrite:
        raise InputError(f"output {out} exists: choose another name, or use --overwrite")
    check_place(out)


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it appears whole or not at all; half a surrogate pair becomes "?"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(text.encode(errors="replace"))
    partial.replace(path)
