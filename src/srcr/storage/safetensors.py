"""Safetensors files, read and written a tensor at a time."""

import hashlib
import json
import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from srcr.errors import InputError
from srcr.numerics.tensors import as_bytes
from srcr.storage.index import INDEX, SINGLE, is_lfs_pointer, read_index, weight_files

#: A single key: safetensors writes several in random order, and the same run must give the same bytes.
METADATA = {"format": "pt"}
#: Names of precisions in the format, largest alignment first: the order in which tensors are laid out.
DTYPE_NAMES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32",
    torch.bfloat16: "BF16", torch.float16: "F16", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
#: Bytes that are read at a time while a file is hashed.
CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Entry:
    """A tensor by the header of its file: bytes ``start:stop`` of the data; ``dtype`` None where torch has
    no name for it here."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    start: int
    stop: int


class TensorFiles:
    """Reads tensors by name from a checkpoint folder, sharded or not, or from ``paths`` of it. Nothing stays
    open: a mapped file would count as memory for as long as it is.

    Raises:
        InputError: no weights, a damaged file, a tensor that is in two files or not in the file that the
            index names, or an index that points outside the folder.
    """

    def __init__(self, folder: Path, paths: Sequence[Path] | None = None) -> None:
        self.folder = folder
        self.paths = weight_files(folder) if paths is None else list(paths)
        self.entries: dict[str, Entry] = {}
        for path in self.paths:
            for name, entry in read_header(path).items():
                if name in self.entries:
                    raise InputError(
                        f"the tensor {name!r} is in two files, {self.entries[name].path} and {path}: keep "
                        "only that of the model"
                    )
                self.entries[name] = entry
        if paths is None and self.paths != [folder / SINGLE] and (folder / INDEX).is_file():
            self._check_index()

    def _check_index(self) -> None:
        for name, file in read_index(self.folder).items():
            entry = self.entries.get(name)
            if entry is not None and entry.path != self.folder / file:
                raise InputError(
                    f"{self.folder / INDEX} says that {name!r} is in {file}, but it is in {entry.path.name}"
                )

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def get(self, name: str) -> Tensor:
        """The tensor, in memory of its own.

        Raises:
            InputError: there is none of that name.
        """
        if name not in self.entries:
            raise InputError(f"{self.folder} has no tensor {name!r}")
        with safe_open(self.entries[name].path, framework="pt") as stream:
            tensor: Tensor = stream.get_tensor(name)
            return tensor.clone()

    def part(self, name: str, index: int) -> Tensor:
        """Entry ``index`` of the tensor along its first axis, in memory of its own; no more is read."""
        with safe_open(self.entries[name].path, framework="pt") as stream:
            part: Tensor = stream.get_slice(name)[index]
            return part.clone()

    def meta(self, name: str) -> Tensor:
        """The tensor's shape and precision, without data."""
        entry = self.entries[name]
        return torch.empty(entry.shape, dtype=entry.dtype, device="meta")

    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor's data."""
        return {name: entry.stop - entry.start for name, entry in self.entries.items()}


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file by its header alone.

    Raises:
        InputError: it is no valid safetensors file.
    """
    try:
        with safe_open(path, framework="pt"):  # the library checks it
            pass
        with path.open("rb") as stream:
            header = _read_json_header(stream.read)
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        if is_lfs_pointer(path):
            raise InputError(
                f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder"
            ) from None
        raise InputError(f"{path} is not a valid safetensors file: {error}") from None
    return {
        name: Entry(
            path, tuple(entry["shape"]), _DTYPES.get(entry["dtype"]), *entry["data_offsets"]
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _read_json_header(read: Callable[[int], bytes]) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", read(8))
    header = json.loads(read(length))
    assert isinstance(header, dict)
    return header


def hash_files(paths: Sequence[Path]) -> str:
    """The SHA-256 over the bytes of several files, in order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def hash_and_inspect(paths: Sequence[Path], inspect: Callable[[str, Tensor], None]) -> str:
    """:func:`hash_files`, and on the way ``inspect`` is given every tensor's name and numbers, flat, a chunk
    at a time: the files are read once."""
    digest = hashlib.sha256()
    buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
    for path in paths:
        entries = sorted(read_header(path).items(), key=lambda item: item[1].start)
        with path.open("rb", buffering=0) as stream:
            prefix = stream.read(8)
            prefix += stream.read(struct.unpack("<Q", prefix)[0])
            digest.update(prefix)
            for name, entry in entries:
                for part in _chunks(stream, entry.stop - entry.start, buffer):
                    digest.update(part.numpy().data)
                    if entry.dtype is not None:
                        inspect(name, part.view(entry.dtype))
    return digest.hexdigest()


def _chunks(stream: Any, size: int, buffer: Tensor) -> Iterator[Tensor]:
    """The next ``size`` bytes of a file, as parts of ``buffer``."""
    while size:
        part = buffer[: min(size, len(buffer))]
        view, filled = part.numpy().data, 0
        while filled < len(part):
            count = stream.readinto(view[filled:])
            if not count:
                raise InputError(f"{stream.name} ends before its tensors do: it is damaged")
            filled += count
        size -= len(part)
        yield part


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a file with the user's own permissions, which safetensors would make stricter."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=METADATA)
    path.chmod(mode)


class TensorFileWriter:
    """Writes a file of the tensors ``layout`` (their shapes and precisions, no data) in any order, with one
    of them in memory at a time. The same bytes as safetensors writes, whose own function wants all at once.
    The file has its whole length from the beginning, and takes the room of what is written: it can be read
    on the way. The tensors ``there`` stay as an earlier writer of the same layout left them. A context
    manager."""

    def __init__(
        self, path: Path, layout: Mapping[str, Tensor], there: Collection[str] = ()
    ) -> None:
        order = list(DTYPE_NAMES)
        names = sorted(layout, key=lambda name: (order.index(layout[name].dtype), name))
        header: dict[str, Any] = {"__metadata__": METADATA}
        self._places: dict[str, tuple[int, int]] = {}
        stop = 0
        for name in names:
            start, stop = stop, stop + layout[name].nbytes
            header[name] = {
                "dtype": DTYPE_NAMES[layout[name].dtype],
                "shape": list(layout[name].shape),
                "data_offsets": [start, stop],
            }
            self._places[name] = start, stop
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._first = 8 + len(text)
        self._stream = path.open("r+b" if there else "wb", buffering=0)
        self._stream.write(struct.pack("<Q", len(text)) + text)
        self._stream.truncate(self._first + stop)
        for name in there:
            del self._places[name]

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of the layout at its place."""
        start, stop = self._places.pop(name)
        data = as_bytes(tensor)
        assert data.numel() == stop - start, f"{name} is not what the layout says"
        self._stream.seek(self._first + start)
        view = data.numpy().data
        while len(view):  # a system call writes 2 GB at most
            view = view[self._stream.write(view) :]

    def __enter__(self) -> "TensorFileWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()
        assert error is not None or not self._places, f"not written: {', '.join(self._places)}"
