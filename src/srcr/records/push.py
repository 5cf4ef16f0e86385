"""What was uploaded, and where it is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PushRecord:
    """An upload: the ``repo``, the ``url`` of its page, the ``commit`` that holds the files, and their names
    and bytes."""

    repo: str
    url: str
    commit: str
    files: tuple[str, ...]
    n_bytes: int
