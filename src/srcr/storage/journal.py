"""What a run has finished, kept beside the work in progress so that a killed run continues.

``OUT.partial/.srcr-in-progress`` holds one JSON object a line: first what decides the result (the run's
fingerprint), then an entry for each finished block with the hash of its file. While the result is written,
blocks move: once a block's tensors are in the weight files, a line says which and with what hash, and the
block's own file goes. A line that was torn, or a block whose file or tensors are missing or damaged, ends
what can be taken over; that block and those behind it are done again.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from srcr.errors import InputError
from srcr.numerics.tensors import as_bytes
from srcr.storage.layout import JOURNAL
from srcr.storage.lock import lock
from srcr.storage.safetensors import TensorFiles, hash_files, save_tensors


class Journal:
    """The journal of a folder, locked for as long as this is open. A context manager.

    Raises:
        InputError: another run is writing into the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stream = (folder / JOURNAL).open("a+", encoding="utf-8")
        try:
            self._lock = lock(folder)
        except BaseException:
            self._stream.close()
            raise
        self._stream.seek(0)
        self.entries: list[dict[str, Any]] = []
        self._moved: dict[int, dict[str, Any]] = {}

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
        moved = {line["moved"]: line for line in lines[1:] if "moved" in line}
        self._moved = {number: line for number, line in moved.items() if self._in_place(line)}
        retained = [line for line in lines[1:] if "retained" in line][:1]
        others = (each for each in lines[1:] if "retained" not in each and "moved" not in each)
        for line in others:
            if line.get("block") != len(self.entries) or not self._intact(line):
                break
            self.entries.append(line)
        count = len(self.entries)
        self._moved = {number: line for number, line in self._moved.items() if number < count}
        self._stream.seek(0)
        self._stream.truncate()
        for line in [
            {"fingerprint": dict(fingerprint)},
            *retained,
            *self.entries,
            *self._moved.values(),
        ]:
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
        with path.open("r+b") as stream:
            os.fsync(stream.fileno())
        line = {"block": number, "sha256": hash_files([path]), **entry}
        self._write(line)
        self.entries.append(line)
        return path

    def move(self, number: int, places: Mapping[str, Sequence[str]]) -> None:
        """Note that the tensors of a block are in the weight files of the result, their names by those of
        the files; then its own file goes. They have reached the disk when this returns."""
        # Config and index too: without them the weight files cannot be read.
        for path in [*(self.folder / name for name in places), *self.folder.glob("*.json")]:
            with path.open("r+b") as stream:
                os.fsync(stream.fileno())
        line = {"moved": number, "places": {name: list(names) for name, names in places.items()}}
        line["tensors_sha256"] = self._hash_tensors(line)
        self._write(line)
        self._moved[number] = line
        self.file(number).unlink()

    def moved(self, number: int) -> list[str] | None:
        """The tensors of a block in the weight files of the result; None where it has a file of its own."""
        line = self._moved.get(number)
        return (
            None if line is None else [name for names in line["places"].values() for name in names]
        )

    def file(self, number: int) -> Path:
        """Where the tensors of a block lie; by its name no weights of the result."""
        return self.folder / f"block-{number:05d}.tensors"

    def files(self) -> list[Path]:
        """Where the tensors of all finished blocks lie that have not been moved."""
        numbers = (entry["block"] for entry in self.entries)
        return [self.file(number) for number in numbers if number not in self._moved]

    def close(self) -> None:
        """Unlock."""
        self._stream.close()
        self._lock.release()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hash_tensors(self, line: Mapping[str, Any]) -> str:
        """The SHA-256 over the tensors of a block that was moved."""
        digest = hashlib.sha256()
        for file, names in line["places"].items():
            tensors = TensorFiles(self.folder, [self.folder / file])
            for name in names:
                digest.update(as_bytes(tensors.get(name)).numpy().data)
        return digest.hexdigest()

    def _in_place(self, line: Mapping[str, Any]) -> bool:
        """Whether the tensors of a block are where it was moved to."""
        try:
            return bool(self._hash_tensors(line) == line["tensors_sha256"])
        except (InputError, OSError, KeyError):
            return False

    def _intact(self, line: dict[str, Any]) -> bool:
        if line["block"] in self._moved:
            return True
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
