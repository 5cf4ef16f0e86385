"""Exact percentiles of a stream that is too long to keep in memory."""

import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

_HALF = 1 << 16


class Quantiles:
    """Takes float32 values in any number, four bytes each in a temporary file, and gives any percentile
    exactly as ``numpy.percentile`` (linear) would; memory stays the same whatever the number.

    The order of floats is that of their bit patterns, so counting the upper 16 bits says in which of
    65,536 buckets a rank falls, and counting the lower 16 bits of that bucket which value it is.
    ``chunk`` values are read back at a time: 4 MB by default, on which no result depends.
    """

    def __init__(self, chunk: int = 1 << 20) -> None:
        self._chunk = chunk
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this object
        self._upper = np.zeros(_HALF, dtype=np.int64)
        self.n = 0

    def add(self, values: npt.NDArray[np.float32]) -> None:
        """Append values of any shape; they must be finite."""
        flat = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
        self._file.write(flat.tobytes())
        self._upper += np.bincount(_keys(flat) >> 16, minlength=_HALF)
        self.n += flat.size

    def percentiles(self, percents: Sequence[float]) -> list[float]:
        """The percentiles, each in [0, 100], of everything added.

        Raises:
            ValueError: nothing was added.
        """
        if self.n == 0:
            raise ValueError("no values")
        places = [percent / 100 * (self.n - 1) for percent in percents]
        values = self._at_ranks({int(place) + more for place in places for more in (0, 1)})
        return [
            values[int(place)]
            + (place - int(place)) * (values[int(place) + 1] - values[int(place)])
            for place in places
        ]

    def octaves(self, lowest: int, highest: int) -> list[int]:
        """How many values lie below 2**lowest, in each octave from there to 2**highest, and from that on:
        highest - lowest + 2 counts."""
        # The first 9 of the 16 bits counted are the sign and the exponent: an octave each.
        by_octave = self._upper.reshape(512, 128).sum(1)
        first, last = (256 + 127 + exponent for exponent in (lowest, highest))
        inner = by_octave[first:last].tolist()
        return [int(by_octave[:first].sum()), *inner, int(by_octave[last:].sum())]

    def _at_ranks(self, ranks: set[int]) -> dict[int, float]:
        """The value of each rank (from 0); ranks past the end give the largest value."""
        last = self.n - 1
        ends = np.cumsum(self._upper)
        bucket = {rank: int(np.searchsorted(ends, min(rank, last), side="right")) for rank in ranks}
        lower = {b: np.zeros(_HALF, dtype=np.int64) for b in set(bucket.values())}
        for keys in self._stored_keys():
            upper = keys >> 16
            for b, counts in lower.items():
                counts += np.bincount(keys[upper == b] & 0xFFFF, minlength=_HALF)
        values = {}
        for rank, b in bucket.items():
            within = min(rank, last) - int(ends[b] - self._upper[b])
            low = int(np.searchsorted(np.cumsum(lower[b]), within, side="right"))
            values[rank] = _value(b << 16 | low)
        return values

    def _stored_keys(self) -> Iterator[npt.NDArray[np.uint32]]:
        self._file.flush()
        self._file.seek(0)
        while part := self._file.read(4 * self._chunk):
            yield _keys(np.frombuffer(part, dtype=np.float32))
        self._file.seek(0, 2)


def _keys(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    """Unsigned integers in the order of the floats."""
    bits = values.view(np.uint32)
    return np.where(bits >> 31 == 1, ~bits, bits | np.uint32(1 << 31))


def _value(key: int) -> float:
    bits = key ^ (1 << 31) if key >> 31 else ~key & 0xFFFFFFFF
    return float(np.array(bits, dtype=np.uint32).view(np.float32))
