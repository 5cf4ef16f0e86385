"""Files and folders that appear whole or not at all; nothing is lost or overwritten unasked.

Everything goes to ``OUT.partial`` and only then takes the name OUT.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from srcr.errors import InputError, SrcrError
from srcr.storage.files import check_parent
from srcr.storage.journal import Journal, finished_blocks
from srcr.storage.layout import JOURNAL, LOCK, RECORD


def check_output(out: Path, source: Path | None, overwrite: bool, resume: bool = False) -> None:
    """Refuse to lose anything; ``source`` is the model's folder, if it has one.

    Raises:
        InputError: OUT exists, or a leftover ``OUT.partial`` does, and neither ``overwrite`` nor ``resume``
            is given; either holds what srcr did not write, or is or holds the model; an earlier result was
            left aside.
    """
    check_parent(out)
    if source is not None:
        source = source.resolve()
        for path in (out, partial_path(out), _aside(out)):
            if path.resolve() == source or path.resolve() in source.parents:
                raise InputError(
                    f"output {path} is or holds the model itself: choose another folder"
                )
        if source in out.resolve().parents:
            raise InputError(
                f"output {out} lies in the model's folder {source}: choose a place beside it"
            )
    if _exists(_aside(out)):
        raise InputError(
            f"{_aside(out)} exists: the earlier {out.name} that an interrupted run had put aside. Move it "
            "back or remove it first"
        )
    for path, mark in ((out, RECORD), (partial_path(out), JOURNAL)):
        if not _exists(path):
            continue
        if not (overwrite or resume):
            remedy = (
                "--overwrite" if path == out else "--resume to continue it, --overwrite to drop it"
            )
            raise InputError(
                f"output {path} exists: choose another name, remove it, or use {remedy}"
            )
        if path.is_symlink() or not path.is_dir():
            raise InputError(f"output {path} is not a folder: srcr will not replace it")
        if not (path / mark).is_file() and any(path.iterdir()):
            raise InputError(
                f"output {path} holds files that srcr did not write (no {mark}): it will not be replaced, "
                "even with --overwrite"
            )


def partial_path(out: Path) -> Path:
    """Where work in progress lies."""
    return out.with_name(out.name + ".partial")


@contextmanager
def atomic_output(
    out: Path, source: Path | None, overwrite: bool, resume: bool = False
) -> Iterator[Journal]:
    """``OUT.partial`` to write into, through its journal; on success it becomes OUT.

    With ``resume`` what an earlier run left there stays, else it begins empty. What has finished blocks
    when a run is interrupted, or the disk refuses, stays as well; after any other failure nothing does
    (but with ``resume``, what was there before).
    What :func:`check_output` refuses is refused again before the name is taken: a run may be long.

    Raises:
        InputError: as :func:`check_output`; another run is writing into ``OUT.partial``.
        SrcrError: the disk refuses.
        KeyboardInterrupt: the user interrupts; it says how to continue.
    """
    check_output(out, source, overwrite, resume)
    partial = partial_path(out)
    made = [path for path in partial.parents if not path.exists()]
    try:
        partial.mkdir(parents=True, exist_ok=True)
        journal = Journal(partial)
    except OSError as error:
        _remove(partial, made)
        raise _refused(out, error) from error
    try:
        if not resume:
            _clear(partial)
        yield journal
        journal.close()
        (partial / LOCK).unlink(missing_ok=True)
        (partial / JOURNAL).unlink()
        _take_name(partial, out, source, overwrite)
    except (OSError, SafetensorError, KeyboardInterrupt) as error:
        journal.close()
        blocks = finished_blocks(partial)
        if not blocks:
            _remove(partial, made)
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(_left_behind(partial, blocks)) from None
        raise _refused(out, error, _left_behind(partial, blocks)) from error
    except BaseException:
        journal.close()
        if not (resume and finished_blocks(partial)):
            _remove(partial, made)
        raise


def _refused(out: Path, error: Exception, left: str = "nothing was left behind") -> SrcrError:
    return SrcrError(f"writing {out} failed: {error}; {left}, make room or choose another place")


def _left_behind(partial: Path, blocks: int) -> str:
    """What an interrupted run leaves."""
    if not blocks:
        return "nothing was left behind"
    what = f"{blocks} finished blocks are" if blocks > 0 else "what was finished is"
    return f"{what} in {partial}: the same command with --resume continues"


def _aside(out: Path) -> Path:
    """Where the earlier result waits while the new one takes its name."""
    return out.with_name(out.name + ".replaced")


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _clear(partial: Path) -> None:
    """Empty a folder but for its lock, which is held, and its journal, which is emptied too."""
    for path in partial.iterdir():
        if path.name == LOCK:
            continue
        if path.name == JOURNAL:
            os.truncate(path, 0)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _take_name(partial: Path, out: Path, source: Path | None, overwrite: bool) -> None:
    """Rename, with an earlier result put aside until the new one is in its place."""
    if not _exists(out):
        partial.rename(out)
        return
    (partial / JOURNAL).touch()
    check_output(out, source, overwrite)
    (partial / JOURNAL).unlink()
    out.rename(_aside(out))
    try:
        partial.rename(out)
    except OSError:
        _aside(out).rename(out)
        raise
    shutil.rmtree(_aside(out))


def _remove(partial: Path, parents: list[Path]) -> None:
    """Remove what this run made: the partial folder, and parents that are still empty."""
    shutil.rmtree(partial, ignore_errors=True)
    for path in parents:
        with suppress(OSError):
            path.rmdir()
