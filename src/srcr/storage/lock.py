"""One writer a folder."""

from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from srcr.errors import InputError
from srcr.storage.layout import LOCK


def lock(folder: Path) -> BaseFileLock:
    """The lock of a folder, held; it goes with the process, as it ends.

    Raises:
        InputError: another run holds it.
    """
    held = FileLock(folder / LOCK, thread_local=False)
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"another run is writing into {folder}: wait for it, or choose another name"
        ) from None
    return held
