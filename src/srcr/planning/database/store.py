"""The level database: every group of linears at every level, on disk, so that a candidate model is put
together by swapping weights and not by compressing again.

Entries are content-addressed: a file is named by the hash of its bytes, and ``index.jsonl`` says which key
(what was compressed, and how) has which hash. A file that does not have the bytes its name promises counts as
missing, and is made again. Several processes may write at once.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from safetensors.torch import load, save
from torch import Tensor

from srcr.errors import SrcrError
from srcr.formats.native import decode_from, encode_all
from srcr.models.topology import LinearGroup
from srcr.numerics.compressed import CompressedWeight
from srcr.plans.specs import CompressionLevel
from srcr.serialize import to_dict

INDEX = "index.jsonl"
#: Held by who adds to the index.
LOCK = "index.lock"


@dataclass(frozen=True)
class IndexEntry:
    """A line of the index: the ``sha256`` of the file that a ``key`` has, and the relative output error of
    each of its linears."""

    key: str
    sha256: str
    errors: dict[str, float]


class LevelDatabase:
    """The levels in ``folder`` (made if need be) that were compressed under the same ``context``, a hash of
    everything that decides them besides group and level."""

    def __init__(self, folder: Path, context: str) -> None:
        self.folder = folder
        self.context = context
        folder.mkdir(parents=True, exist_ok=True)
        self._index: dict[str, IndexEntry] = {}
        self._intact: set[str] = set()
        self.refresh()

    def refresh(self) -> None:
        """Read what others have added since."""
        with suppress(FileNotFoundError):
            for line in (self.folder / INDEX).read_text(encoding="utf-8").splitlines():
                with suppress(ValueError, TypeError):  # a torn line is no entry
                    entry = IndexEntry(**json.loads(line))
                    self._index[entry.key] = entry

    def find(self, group: LinearGroup, level: CompressionLevel) -> IndexEntry | None:
        """The entry of a group at a level, if it is there and whole."""
        entry = self._index.get(self._key(group, level))
        return entry if entry is not None and self._is_intact(entry) else None

    def errors(self, group: LinearGroup, level: CompressionLevel) -> dict[str, float] | None:
        """The relative output error of each linear of a group at a level; None where a part is not there."""
        entries = [self.find(part, level) for part in group.inputs()]
        known = [entry for entry in entries if entry is not None]
        if len(known) < len(entries):
            return None
        return {name: error for entry in known for name, error in entry.errors.items()}

    def put(
        self, group: LinearGroup, level: CompressionLevel, weights: Mapping[str, CompressedWeight]
    ) -> IndexEntry:
        """Store the weights of a group at a level; the entry has reached the disk when this returns."""
        data = save(encode_all(weights))
        errors = {name: weight.error for name, weight in weights.items()}
        entry = IndexEntry(self._key(group, level), hashlib.sha256(data).hexdigest(), errors)
        path = self._path(entry)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        with (
            FileLock(self.folder / LOCK),
            (self.folder / INDEX).open("a", encoding="utf-8") as stream,
        ):
            line = json.dumps(to_dict(entry), separators=(",", ":"))
            stream.write(f"\n{line}\n")  # apart from a torn line
            stream.flush()
            os.fsync(stream.fileno())
        self._index[entry.key] = entry
        self._intact.add(entry.sha256)
        return entry

    def weights(self, entry: IndexEntry) -> dict[str, Tensor]:
        """The linears of an entry as an engine would see them: float32 [rows, cols] by name."""
        tensors = load(self._path(entry).read_bytes())
        return {
            name: decode_from(tensors, tensors.__getitem__, name).dequantize()
            for name in sorted(entry.errors)
        }

    def _key(self, group: LinearGroup, level: CompressionLevel) -> str:
        # As floats: 0 and 0.0 are the same level.
        text = json.dumps([self.context, group.names, float(level.sparsity), level.num_bits])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _path(self, entry: IndexEntry) -> Path:
        return self.folder / f"{entry.sha256}.safetensors"

    def _is_intact(self, entry: IndexEntry) -> bool:
        if entry.sha256 not in self._intact:
            with suppress(OSError):
                data = self._path(entry).read_bytes()
                if hashlib.sha256(data).hexdigest() == entry.sha256:
                    self._intact.add(entry.sha256)
        return entry.sha256 in self._intact


class CachedWeights:
    """The weights of any group at any level, from a database; the first ``cache_bytes`` of them stay in
    memory."""

    def __init__(self, database: LevelDatabase, cache_bytes: int) -> None:
        self._database = database
        self._left = cache_bytes
        self._cached: dict[tuple[LinearGroup, CompressionLevel], Mapping[str, Tensor]] = {}

    def __call__(self, group: LinearGroup, level: CompressionLevel) -> Mapping[str, Tensor]:
        """Float32 [rows, cols] of each linear by name.

        Raises:
            SrcrError: the database has lost them.
        """
        if (group, level) in self._cached:
            return self._cached[group, level]
        weights: dict[str, Tensor] = {}
        for part in group.inputs():
            entry = self._database.find(part, level)
            if entry is None:
                self._database.refresh()
                entry = self._database.find(part, level)
            if entry is None:
                raise SrcrError(
                    f"the level database {self._database.folder} has lost {part.label} at {level}: run again "
                    "with --resume to build it anew"
                )
            weights |= self._database.weights(entry)
        self._left -= sum(weight.nbytes for weight in weights.values())
        if self._left > 0:
            self._cached[group, level] = weights
        return weights
