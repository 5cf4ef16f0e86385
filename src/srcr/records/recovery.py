"""The record of a recovery: what was trained, on what, for how long, and what it gave back."""

from dataclasses import dataclass

from srcr.plans.recovery import RecoverySpec
from srcr.records.estimate import Estimate
from srcr.records.text import TextRecord


@dataclass(frozen=True)
class TrainingPoint:
    """A look at the held-out text after ``step`` steps: the ``kl`` there, nats a token, the mean ``loss``
    of the steps since the last look (None: at the start), and how many ``seconds`` the look took."""

    step: int
    loss: float | None
    kl: float
    seconds: float


@dataclass(frozen=True)
class RecoveryRecord:
    """A training, and what came of it.

    ``source``: the compressed model that was trained (None: it was trained before it was written); ``text``:
    what it was trained on; ``held_out``: by what half its best state was chosen, and on what half measured;
    ``steps``, ``tokens`` and ``seconds`` of training, and the ``best_step`` that was kept; ``before`` and
    ``after``: KL to the original there, nats a token, ``change`` their paired difference; ``accepted``:
    whether that is a gain beyond doubt, else the model is as it came; ``stopped``: why training ended early;
    ``blocks``: which blocks were changed one by one before, in order (None: none was tried);
    ``fingerprint``: a hash of everything that decides the result (None: the compression's says it).
    """

    spec: RecoverySpec
    source: str | None
    text: TextRecord
    held_out: TextRecord
    steps: int
    best_step: int
    tokens: int
    seconds: float
    before: Estimate
    after: Estimate
    change: Estimate
    accepted: bool
    curve: tuple[TrainingPoint, ...]
    stopped: str | None = None
    blocks: tuple[bool, ...] | None = None
    fingerprint: str | None = None

    @property
    def summary(self) -> str:
        """What it gave back, in a line."""
        trained = f"{self.steps} steps, {self.tokens} tokens, {self.seconds / 60:.1f} minutes"
        if not self.accepted:
            return (
                f"no gain on held-out text (KL {self.before.value:.4g} to {self.after.value:.4g}), so the "
                f"model is as it was; {trained}"
            )
        return f"KL {self.before.value:.4g} to {self.after.value:.4g} on held-out text; {trained}"
