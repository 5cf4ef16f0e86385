"""What is measured of a model, as people ask for it."""

from dataclasses import dataclass
from typing import Any

from srcr.errors import InputError


@dataclass(frozen=True)
class SemanticSpec:
    """``n`` prompts, each the first ``prompt_len`` tokens of a row of ``prompts`` (a text source, or token
    ids; None: that of the evaluation), continued by ``max_new_tokens``, compared by ``scorer`` (None:
    all-MiniLM-L6-v2 where installed, else "base"; see :func:`srcr.metrics.embeddings.load_scorer`)."""

    prompts: Any = None
    n: int = 200
    prompt_len: int = 32
    max_new_tokens: int = 32
    scorer: str | None = None

    def __post_init__(self) -> None:
        if self.n < 2:
            raise InputError(
                f"{self.n} prompts give no interval and no chance level: use at least 2"
            )
        if self.prompt_len < 2:
            raise InputError(f"prompt_len {self.prompt_len} must be at least 2 tokens")
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens {self.max_new_tokens} must be at least 1")
