"""Entropy coding of small symbols: what compressed weights take if nothing is wasted.

A matrix of symbols is coded by asymmetric numeral systems (Duda, arXiv 1311.2540; the library constriction).
Rows and columns are sorted into classes by how large their symbols are; each pair of classes has its own
distribution, which stands in front of the symbols. There are as many classes as pay for their tables.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from srcr.errors import InputError
from srcr.numerics.tensors import row_chunks

Symbols = npt.NDArray[np.uint8]
#: Symbols that are coded together.
CHUNK = 1 << 22
#: Classes of rows and of columns that are tried.
CLASSES = ((1, 1), (2, 2), (4, 4), (8, 8), (16, 16), (16, 1), (1, 16), (4, 1), (1, 4))
MOST_CLASSES = 16
#: First symbol, how many there are, classes of rows and of columns, bytes of the tables.
_HEADER = struct.Struct("<BHBBI")
#: ``round(2^24 * 2^(k / 8))``: numbers of tables are whole, so that every machine has the same.
_EIGHTHS = (16777216, 18295683, 19951585, 21757357, 23726566, 25874004, 28215802, 30769550)
_LEVELS = np.array([(_EIGHTHS[n % 8] << n // 8) - (1 << 24) for n in range(256)], np.float64)


def encode_symbols(symbols: Symbols) -> bytes:
    """The code of ``symbols`` [rows, cols], which :func:`decode_symbols` reads."""
    parts = [_encode_chunk(symbols[rows]) for rows in row_chunks(symbols, CHUNK)]
    return b"".join(struct.pack("<Q", len(part)) + part for part in parts)


def decode_symbols(data: bytes, shape: tuple[int, int]) -> Symbols:
    """The symbols uint8 [rows, cols] that were coded.

    Raises:
        InputError: the code is none of symbols of this shape.
    """
    result = np.empty(shape, np.uint8)
    at = 0
    for rows in row_chunks(result, CHUNK):
        part = result[rows]
        (length,) = struct.unpack_from("<Q", _slice(data, at, 8))
        _decode_chunk(_slice(data, at + 8, length), part)
        at += 8 + length
    if at != len(data):
        raise InputError("coded symbols are longer than what they stand for")
    return result


def _slice(data: bytes, start: int, length: int) -> bytes:
    if length > len(data) - start:
        raise InputError("coded symbols end early")
    return data[start : start + length]


@dataclass(frozen=True, eq=False)
class _Classes:
    """The class of each row and column, and how many there are of each."""

    rows: Symbols
    cols: Symbols
    counts: tuple[int, int]

    def blocks(self) -> Iterator[tuple[int, slice, slice]]:
        """The number of each pair of classes and where it lies, once rows and columns are sorted."""
        edges = [
            np.searchsorted(np.sort(classes), np.arange(count + 1))
            for classes, count in zip((self.rows, self.cols), self.counts, strict=True)
        ]
        for i in range(self.counts[0]):
            for j in range(self.counts[1]):
                at = slice(edges[0][i], edges[0][i + 1]), slice(edges[1][j], edges[1][j + 1])
                yield i * self.counts[1] + j, *at

    def orders(self) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """The rows and the columns by their classes."""
        return np.argsort(self.rows, kind="stable"), np.argsort(self.cols, kind="stable")


def _encode_chunk(symbols: Symbols) -> bytes:
    first = int(symbols.min(initial=255)) if symbols.size else 0
    count = max(2, int(symbols.max(initial=0)) - first + 1)
    shifted = symbols - np.uint8(first)
    classes, tables = _choose_classes(shifted, count)
    packed = _compress(tables.tobytes())
    rows, cols = classes.orders()
    ordered = shifted[rows][:, cols]
    constriction = _library()
    coder = constriction.stream.stack.AnsCoder()
    for number, *at in reversed(list(classes.blocks())):
        block = ordered[tuple(at)]
        if block.size:
            coder.encode_reverse(block.ravel().astype(np.int32), _model(tables[number]))
    header = _HEADER.pack(first, count, *classes.counts, len(packed))
    ids = _pack_classes(classes.rows, classes.counts[0]) + _pack_classes(
        classes.cols, classes.counts[1]
    )
    words: npt.NDArray[np.uint32] = coder.get_compressed().astype("<u4")
    return header + ids + packed + words.tobytes()


def _decode_chunk(data: bytes, out: Symbols) -> None:
    """Put the symbols into ``out`` [rows, cols]."""
    first, count, row_classes, col_classes, size = _HEADER.unpack(_slice(data, 0, _HEADER.size))
    if not (1 <= row_classes <= MOST_CLASSES and 1 <= col_classes <= MOST_CLASSES and count <= 256):
        raise InputError("coded symbols have tables that cannot be")
    at, ids = _HEADER.size, []
    for length, number in zip(out.shape, (row_classes, col_classes), strict=True):
        n_bytes = _class_bytes(length, number)
        ids.append(_unpack_classes(_slice(data, at, n_bytes), length, number))
        at += n_bytes
    shape = row_classes * col_classes, count
    tables = _decompress(_slice(data, at, size), shape[0] * shape[1])
    levels = np.frombuffer(tables, np.uint8).reshape(shape)
    rest = data[at + size :]
    if len(rest) % 4:
        raise InputError("coded symbols end within a word")
    words = np.frombuffer(rest, "<u4").astype(np.uint32)
    classes = _Classes(ids[0], ids[1], (row_classes, col_classes))
    ordered = np.empty(out.shape, np.uint8)
    try:
        coder = _library().stream.stack.AnsCoder(words)
        for number, rows, cols in classes.blocks():
            block = ordered[rows, cols]
            if block.size:
                decoded = coder.decode(_model(levels[number]), block.size)
                block[...] = decoded.reshape(block.shape).astype(np.uint8)
        whole = coder.is_empty()
    except (ValueError, AssertionError) as error:
        raise InputError(f"coded symbols are damaged: {error}") from None
    if not whole:
        raise InputError("coded symbols are longer than what they stand for")
    by_row, by_col = classes.orders()
    out[np.ix_(by_row, by_col)] = ordered + np.uint8(first)


def _choose_classes(symbols: Symbols, count: int) -> tuple[_Classes, Symbols]:
    """The classes that make the code shortest, and the levels of their tables [pairs, count]."""
    sizes = [_sizes(symbols, axis) for axis in (1, 0)]
    fine = [_quantiles(each, MOST_CLASSES) for each in sizes]
    histogram = _histogram(symbols, fine[0], fine[1], count)
    best: tuple[float, _Classes, Symbols] | None = None
    for numbers in CLASSES:
        factors = [MOST_CLASSES // number for number in numbers]
        tables = histogram.reshape(numbers[0], factors[0], numbers[1], factors[1], count)
        tables = tables.sum(axis=(1, 3)).reshape(-1, count)
        cost = _cost(tables) + 8 * sum(map(_class_bytes, symbols.shape, numbers))
        if best is None or cost < best[0]:
            rows, cols = (each // factor for each, factor in zip(fine, factors, strict=True))
            best = cost, _Classes(rows, cols, numbers), _levels(tables)
    assert best is not None
    return best[1], best[2]


def _sizes(symbols: Symbols, axis: int) -> npt.NDArray[np.float64]:
    """How far, on average, the symbols of each row (axis 1) or column (0) are from the most frequent one."""
    if not symbols.size:
        return np.zeros(symbols.shape[1 - axis])
    mode = np.bincount(symbols.ravel(), minlength=256).argmax()
    distance = np.abs(np.arange(256) - mode).astype(np.uint8)
    means: npt.NDArray[np.float64] = distance[symbols].mean(axis=axis, dtype=np.float64)
    return means


def _quantiles(sizes: npt.NDArray[np.float64], count: int) -> Symbols:
    """The class of each of ``sizes``: about as many in each, from small to large."""
    ranks = np.empty(len(sizes), np.int64)
    ranks[np.argsort(sizes, kind="stable")] = np.arange(len(sizes))
    return (ranks * count // max(1, len(sizes))).astype(np.uint8)


def _histogram(symbols: Symbols, rows: Symbols, cols: Symbols, count: int) -> npt.NDArray[np.int64]:
    """How often each symbol occurs in each pair of fine classes, [16, 16, count]."""
    result = np.zeros((MOST_CLASSES, MOST_CLASSES, count), np.int64)
    contexts = cols.astype(np.int32) * count
    for row_class in range(MOST_CLASSES):
        part = symbols[rows == row_class]
        flat = np.bincount((part + contexts[None]).ravel(), minlength=MOST_CLASSES * count)
        result[row_class] = flat.reshape(MOST_CLASSES, count)
    return result


def _cost(tables: npt.NDArray[np.int64]) -> float:
    """Bits that symbols and tables take, about."""
    totals = tables.sum(axis=1, keepdims=True)
    share = tables / np.maximum(totals, 1)
    bits = -(tables * np.log2(np.where(tables > 0, share, 1.0))).sum()
    return float(bits) + 6.0 * np.count_nonzero(tables)


def _levels(tables: npt.NDArray[np.int64]) -> Symbols:
    """Counts as eighths of their logarithm to the base 2: precise to a twentieth, a byte each."""
    levels: Symbols = np.rint(8 * np.log2(tables + 1.0)).astype(np.uint8)
    return levels


def _model(levels: Symbols) -> Any:
    """The distribution of a table."""
    weights = _LEVELS[levels]
    if not weights.any():
        weights = np.ones_like(weights)
    return _library().stream.model.Categorical(weights, perfect=False)


def _class_bytes(length: int, number: int) -> int:
    return 0 if number == 1 else (length + 1) // 2


def _pack_classes(classes: Symbols, number: int) -> bytes:
    """Four bits a class."""
    if number == 1:
        return b""
    padded = np.append(classes, np.zeros(len(classes) % 2, np.uint8))
    return (padded[::2] | padded[1::2] << 4).tobytes()


def _unpack_classes(data: bytes, length: int, number: int) -> Symbols:
    classes: Symbols = np.zeros(length + length % 2, np.uint8)
    if number == 1:
        return classes[:length]
    packed = np.frombuffer(data, np.uint8)
    classes[::2], classes[1::2] = packed & 15, packed >> 4
    result: Symbols = classes[:length]
    if result.size and int(result.max()) >= number:
        raise InputError("coded symbols have classes that cannot be")
    return result


def _compress(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(level=19).compress(data)


def _decompress(data: bytes, size: int) -> bytes:
    """``size`` bytes.

    Raises:
        InputError: it is damaged, or other bytes come out.
    """
    import zstandard

    try:
        result = zstandard.ZstdDecompressor().decompress(data, max_output_size=size)
    except zstandard.ZstdError as error:
        raise InputError(f"coded tables are damaged: {error}") from None
    if len(result) != size:
        raise InputError("coded tables are damaged")
    return result


def _library() -> Any:
    import constriction

    return constriction
