"""One file of named records, each with its own checksum: written and read from front to back, or at random.

The layout is docs/archive.md; nothing is allocated by what a file says of itself beyond its own size.
"""

import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from srcr.errors import InputError

MAGIC, VERSION, END = b"srcrz\0", 1, b"srcrzEND"
_START = struct.Struct("<6sH")
_LENGTHS = struct.Struct("<IQ")
_FOOTER = struct.Struct("<Q8s")
#: The record at the end of a file that says where the others begin.
INDEX = "index"
#: Bytes of a record's header, of the index, and numbers of a tensor at most.
MOST_HEADER, MOST_INDEX, MOST_NUMBERS = 1 << 20, 1 << 28, 1 << 40
DIGEST = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Record:
    """A record: its ``name``, what its ``header`` says beside it, and its ``payload``."""

    name: str
    header: Mapping[str, Any]
    payload: bytes

    def shape(self) -> tuple[int, ...]:
        """The shape that the header says.

        Raises:
            InputError: it is none.
        """
        shape = self.header.get("shape")
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            raise InputError(f"the archive's record {self.name!r} has no shape")
        if math.prod(shape) > MOST_NUMBERS:
            raise InputError(f"the archive's record {self.name!r} has the shape {shape}")
        return tuple(shape)

    def parts(self) -> dict[str, bytes]:
        """The payload in the parts whose bytes the header counts.

        Raises:
            InputError: they do not make up the payload.
        """
        sizes, result, at = self.header.get("parts"), {}, 0
        if not isinstance(sizes, dict) or not all(
            type(n) is int and n >= 0 for n in sizes.values()
        ):
            raise InputError(f"the archive's record {self.name!r} has no parts")
        for key, size in sizes.items():
            result[key] = self.payload[at : at + size]
            at += size
        if at != len(self.payload):
            raise InputError(f"the archive's record {self.name!r} has parts of another size")
        return result


class ArchiveWriter:
    """Writes records into a file, one after the other; the index follows at the end of the ``with``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offsets: dict[str, int] = {}
        self._file: BufferedIOBase | None = None

    def __enter__(self) -> Self:
        self._file = self._path.open("wb")
        self._file.write(_START.pack(MAGIC, VERSION))
        return self

    def write(self, record: Record) -> None:
        """Write a record."""
        assert self._file is not None
        self._offsets[record.name] = self._file.tell()
        self._write(record)

    def _write(self, record: Record) -> None:
        assert self._file is not None
        header = json.dumps({"name": record.name, **record.header}).encode()
        lengths = _LENGTHS.pack(len(header), len(record.payload))
        for part in (lengths, header, record.payload):
            self._file.write(part)
        self._file.write(_digest(lengths, header, record.payload))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._file is not None
        if kind is None:
            at = self._file.tell()
            self._write(Record(INDEX, {}, json.dumps(self._offsets).encode()))
            self._file.write(_FOOTER.pack(at, END))
        self._file.close()


class ArchiveFile:
    """The records of a file, by name.

    Raises:
        InputError: it is no archive, cut off, damaged, or of a later version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size = path.stat().st_size
        with path.open("rb") as file:
            _read_start(file, path)
            if self._size < _START.size + _FOOTER.size:
                raise InputError(f"{path} is cut off")
            file.seek(self._size - _FOOTER.size)
            at, end = _FOOTER.unpack(file.read(_FOOTER.size))
            if end != END or not _START.size <= at < self._size:
                raise InputError(f"{path} is cut off: it does not end as an archive does")
            file.seek(at)
            index = _read_record(file, path, self._size, MOST_INDEX)
        if index.name != INDEX:
            raise InputError(f"{path} is damaged: its index is not where it says")
        self._offsets = _checked_index(index, path, self._size)

    def __contains__(self, name: str) -> bool:
        return name in self._offsets

    def names(self) -> list[str]:
        """Every record's name, in their order."""
        return list(self._offsets)

    def read(self, name: str) -> Record:
        """A record, its checksum compared.

        Raises:
            InputError: it is damaged.
        """
        with self.path.open("rb") as file:
            file.seek(self._offsets[name])
            record = _read_record(file, self.path, self._size, self._size, name)
        if record.name != name:
            raise InputError(f"{self.path} is damaged: {name} is not where its index says")
        return record

    def header(self, name: str) -> Record:
        """A record without its payload, and so unchecked: its name and header."""
        with self.path.open("rb") as file:
            file.seek(self._offsets[name])
            length, _ = _read_lengths(file, self.path, self._size, self._size, name)
            return _parse(file.read(length), b"", self.path)


def stream_records(file: BufferedIOBase, path: Path) -> Iterator[Record]:
    """The records of a file that can only be read from front to back.

    Raises:
        InputError: it is no archive, cut off, or damaged.
    """
    _read_start(file, path)
    while True:
        record = _read_record(file, path, MOST_NUMBERS, MOST_NUMBERS)
        if record.name == INDEX:
            return
        yield record


def _read_start(file: BufferedIOBase, path: Path) -> None:
    data = file.read(_START.size)
    if len(data) < _START.size or data[: len(MAGIC)] != MAGIC:
        raise InputError(f"{path} is no srcr archive")
    _, version = _START.unpack(data)
    if version != VERSION:
        raise InputError(
            f"{path} is an archive of version {version}, and this srcr reads {VERSION}: use a later srcr"
        )


def _read_lengths(
    file: BufferedIOBase, path: Path, size: int, most: int, name: str
) -> tuple[int, int]:
    data = file.read(_LENGTHS.size)
    if len(data) < _LENGTHS.size:
        raise InputError(f"{path} is cut off")
    header, payload = _LENGTHS.unpack(data)
    if header > MOST_HEADER or payload > most or header + payload > size:
        raise InputError(f"{path} is damaged: {name} announces more bytes than there are")
    return header, payload


def _read_record(
    file: BufferedIOBase, path: Path, size: int, most: int, name: str = "a record"
) -> Record:
    header_bytes, payload_bytes = _read_lengths(file, path, size, most, name)
    header, payload = file.read(header_bytes), file.read(payload_bytes)
    digest = file.read(DIGEST)
    if len(digest) < DIGEST:
        raise InputError(f"{path} is cut off")
    if digest != _digest(_LENGTHS.pack(header_bytes, payload_bytes), header, payload):
        raise InputError(f"{path} is damaged: the checksum of {name} is another")
    return _parse(header, payload, path)


def _parse(header: bytes, payload: bytes, path: Path) -> Record:
    try:
        data = json.loads(header)
        return Record(str(data.pop("name")), data, payload)
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        raise InputError(f"{path} is damaged: a record has no header") from None


def _checked_index(index: Record, path: Path, size: int) -> dict[str, int]:
    try:
        offsets = json.loads(index.payload)
    except (ValueError, RecursionError):
        offsets = None
    fine = isinstance(offsets, dict) and all(
        type(at) is int and _START.size <= at < size for at in offsets.values()
    )
    if not fine:
        raise InputError(f"{path} is damaged: its index is none")
    return dict(offsets)


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()
