"""One writer a folder."""

import fcntl
from pathlib import Path
from typing import IO

from srcr.errors import InputError


def lock(path: Path) -> IO[str]:
    """The file at ``path``, made if need be, open and locked; the lock goes with the process, as it ends.

    Raises:
        InputError: another run holds it.
    """
    stream = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.close()
        raise InputError(
            f"another run is writing into {path.parent}: wait for it, or choose another name"
        ) from None
    stream.seek(0)
    return stream
