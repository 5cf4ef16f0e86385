"""What a record keeps of the token ids of a run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TextRecord:
    """Token ids of a run: their source, ``samples`` rows of at most ``seq_len`` tokens, the hash of all, and
    where it is kept a short hash of each row; how many ``tokens`` they are without padding (None: an older
    record), and the ids that each row begins with."""

    source: str
    samples: int
    seq_len: int
    sha256: str
    rows: tuple[str, ...] | None = None
    tokens: int | None = None
    prefix: tuple[int, ...] = ()

    @property
    def size(self) -> str:
        """Rows and tokens for people: "32 x 256 tokens", "32 x up to 256 tokens" where they differ."""
        differ = self.tokens is not None and self.tokens < self.samples * self.seq_len
        return f"{self.samples} x {'up to ' if differ else ''}{self.seq_len} tokens"
