"""What a run has finished, kept beside the work in progress so that a killed run continues.

``OUT.partial/.srcr-in-progress`` holds one JSON object a line: first what decides the result (the run's
fingerprint), then an entry for each finished block with the hash of its file. A line that was torn, or a
block whose file is missing or damaged, ends what can be taken over; that block and those behind it are
done again.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from srcr.errors import InputError
from srcr.storage.layout import JOURNAL
from srcr.storage.lock import lock
from srcr.storage.safetensors import hash_files, save_tensors


class Journal:
    """The journal of a folder, locked for as long as this is open. A context manager.

    Raises:
        InputError: another run is writing into the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stream = lock(folder / JOURNAL)
        self.entries: list[dict[str, Any]] = []

    def begin(self, fingerprint: Mapping[str, str]) -> None:
        """Take over what an earlier run with the same fingerprint has finished, else start afresh.

        Raises:
            InputError: the folder holds a run with another fingerprint.
        """
        lines = _lines(self._stream)
        if lines:
            earlier = lines[0].get("fingerprint", {})
            differing = [k for k in fingerprint if earlier.get(k) != fingerprint[k]]
            if differing:
                raise InputError(
                    f"{self.folder} holds a run with another {' and '.join(differing)}: give the same "
                    "options to continue it, or --overwrite to start afresh"
                )
        self.entries = []
        retained = [line for line in lines[1:] if "retained" in line][:1]
        for line in (each for each in lines[1:] if "retained" not in each):
            if line.get("block") != len(self.entries) or not self._intact(line):
                break
            self.entries.append(line)
        self._stream.seek(0)
        self._stream.truncate()
        for line in [{"fingerprint": dict(fingerprint)}, *retained, *self.entries]:
            self._write(line)

    def retain(self) -> None:
        """Note that something besides blocks is worth continuing from."""
        self._write({"retained": True})

    def add(self, tensors: dict[str, Tensor], **entry: Any) -> Path:
        """Write the next block's tensors to its file, then note it; both have reached the disk when this
        returns. The file's path."""
        number = len(self.entries)
        path = self.file(number)
        save_tensors(tensors, path)
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        line = {"block": number, "sha256": hash_files([path]), **entry}
        self._write(line)
        self.entries.append(line)
        return path

    def file(self, number: int) -> Path:
        """Where the tensors of a block lie."""
        return self.folder / f"block-{number:05d}.safetensors"

    def files(self) -> list[Path]:
        """Where the tensors of all finished blocks lie."""
        return [self.file(entry["block"]) for entry in self.entries]

    def close(self) -> None:
        """Unlock."""
        self._stream.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _intact(self, line: dict[str, Any]) -> bool:
        path = self.file(line["block"])
        return path.is_file() and hash_files([path]) == line.get("sha256")

    def _write(self, line: dict[str, Any]) -> None:
        self._stream.write(json.dumps(line, separators=(",", ":")) + "\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())


def finished_blocks(folder: Path) -> int:
    """How many blocks a folder's journal names; -1 where there are none but something else to continue."""
    try:
        with (folder / JOURNAL).open(encoding="utf-8") as stream:
            lines = _lines(stream)[1:]
        blocks = sum("block" in line for line in lines)
        return -1 if lines and not blocks else blocks
    except OSError:
        return 0


def _lines(stream: IO[str]) -> list[dict[str, Any]]:
    """The whole lines of a journal, up to the first that is not."""
    lines = []
    for text in stream:
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not text.endswith("\n") or not isinstance(line, dict):
            break
        lines.append(line)
    return lines
