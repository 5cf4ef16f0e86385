"""What engines say of a checkpoint: the result of ``srcr verify``."""

from dataclasses import dataclass
from typing import Literal

#: Whether logits agree, differ, or were not asked for.
Outcome = Literal["agrees", "differs", "fails", "skipped"]


@dataclass(frozen=True)
class EngineCheck:
    """What one engine said. ``difference``: its logits from those that the files stand for, relative in norm,
    and what that may be (``tolerance``); ``top1_agreement``: share of positions with the same likeliest
    token; ``reason``: why it was skipped, or how it failed."""

    engine: str
    outcome: Outcome
    reason: str | None = None
    difference: float | None = None
    tolerance: float | None = None
    top1_agreement: float | None = None


@dataclass(frozen=True)
class VerificationResult:
    """What the engines say of the checkpoint in ``folder``, of a ``format``, over so many ``tokens``."""

    folder: str
    format: str
    tokens: int
    checks: tuple[EngineCheck, ...]

    @property
    def passed(self) -> bool:
        """Whether no engine differs or fails."""
        return all(check.outcome in ("agrees", "skipped") for check in self.checks)
