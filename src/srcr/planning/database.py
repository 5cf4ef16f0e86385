"""The level database: every decision unit at every level, on disk, so that a candidate model is put
together by swapping weights and not by compressing again.

Entries are content-addressed: a file is named by the hash of its bytes, and ``index.jsonl`` says which key
(what was compressed, and how) has which hash. A file that does not have the bytes its name promises counts as
missing, and is made again. Several processes may write at once.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from safetensors.torch import load, save
from torch import Tensor

from srcr.numerics.grid import Grid
from srcr.planning.levels import Level
from srcr.types import CompressedWeight

INDEX = "index.jsonl"


@dataclass(frozen=True)
class Entry:
    """Where a level lies, and the relative output error of each of its linears."""

    sha256: str
    errors: Mapping[str, float]


class LevelDatabase:
    """The levels in ``folder`` (made if need be) that were compressed under the same ``context``, a hash of
    everything that decides them besides unit and level."""

    def __init__(self, folder: Path, context: str) -> None:
        self.folder = folder
        self.context = context
        folder.mkdir(parents=True, exist_ok=True)
        self._index: dict[str, Entry] = {}
        self._sound: set[str] = set()
        self.refresh()

    def refresh(self) -> None:
        """Read what others have added since."""
        with suppress(FileNotFoundError):
            for line in (self.folder / INDEX).read_text(encoding="utf-8").splitlines():
                with suppress(ValueError, KeyError, TypeError):  # a torn line is no entry
                    found = json.loads(line)
                    self._index[found["key"]] = Entry(found["sha256"], found["errors"])

    def find(self, names: tuple[str, ...], level: Level) -> Entry | None:
        """The entry of a unit at a level, if it is there and whole."""
        entry = self._index.get(self._key(names, level))
        return entry if entry is not None and self._whole(entry) else None

    def put(
        self, names: tuple[str, ...], level: Level, made: Mapping[str, CompressedWeight]
    ) -> Entry:
        """Store a unit at a level; it has reached the disk when this returns."""
        data = save(_tensors(made))
        entry = Entry(hashlib.sha256(data).hexdigest(), {name: w.error for name, w in made.items()})
        path = self._path(entry)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        key = self._key(names, level)
        line = {"key": key, "sha256": entry.sha256, "errors": dict(entry.errors)}
        with (self.folder / INDEX).open("a", encoding="utf-8") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            stream.write("\n" + json.dumps(line, separators=(",", ":")))  # apart from a torn line
            stream.flush()
            os.fsync(stream.fileno())
        self._index[key] = entry
        self._sound.add(entry.sha256)
        return entry

    def weights(self, entry: Entry, dtype: torch.dtype) -> dict[str, Tensor]:
        """The linears of an entry as an engine would see them: float32 [rows, cols] by name."""
        stored = load(self._path(entry).read_bytes())
        names = {name.rpartition(":")[0] for name in stored}
        return {name: _dequantized(name, stored, dtype) for name in sorted(names)}

    def _key(self, names: tuple[str, ...], level: Level) -> str:
        text = json.dumps([self.context, names, level.sparsity, level.num_bits])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _path(self, entry: Entry) -> Path:
        return self.folder / f"{entry.sha256}.safetensors"

    def _whole(self, entry: Entry) -> bool:
        if entry.sha256 not in self._sound:
            with suppress(OSError):
                data = self._path(entry).read_bytes()
                if hashlib.sha256(data).hexdigest() == entry.sha256:
                    self._sound.add(entry.sha256)
        return entry.sha256 in self._sound


def entry_bytes(size: int, level: Level, groups: int) -> int:
    """About how many bytes a unit of ``size`` weights and ``groups`` scales takes at a level."""
    return size * level.num_bits // 8 + 4 * groups


def _tensors(made: Mapping[str, CompressedWeight]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, weight in made.items():
        if weight.codes is None or weight.grid is None:
            assert weight.values is not None
            found[f"{name}:values"] = weight.values.contiguous()
            continue
        grid = weight.grid
        found[f"{name}:packed"] = pack_to_int32(weight.codes, grid.num_bits)
        found[f"{name}:scale"] = grid.scale.to(grid.dtype).contiguous()
        found[f"{name}:shape"] = torch.tensor([*weight.codes.shape, grid.num_bits])
        if grid.zero_point is not None:
            found[f"{name}:zero"] = grid.zero_point.to(torch.int8)
    return found


def _dequantized(name: str, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    if f"{name}:values" in stored:
        return stored[f"{name}:values"].to(dtype).to(torch.float32)
    rows, cols, bits = stored[f"{name}:shape"].tolist()
    codes = unpack_from_int32(stored[f"{name}:packed"], bits, torch.Size((rows, cols)))
    scale = stored[f"{name}:scale"]
    zero = stored.get(f"{name}:zero")
    zero = None if zero is None else zero.to(torch.float32)
    grid = Grid(scale.to(torch.float32), zero, bits, cols // scale.shape[1], dtype)
    return grid.dequantize(codes)
