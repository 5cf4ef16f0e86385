"""How a compressed model is trained: what, by which loss, how long."""

import re
from dataclasses import dataclass
from typing import Literal

from srcr.errors import InputError
from srcr.serialize import STRICT

#: What ends training, by its unit: "10min", "2h", "500steps".
_UNITS = {"s": 1 / 60, "min": 1.0, "h": 60.0}

Stage = Literal["distill", "blockwise", "both"]
Trained = Literal["codes", "scales"]
LossName = Literal["kl", "cakld"]


@dataclass(frozen=True)
class RecoverySpec:
    """Training against the original model.

    ``stage``: "distill" (end to end, on the original's predictions), "blockwise" (each block, on what the
    original's gives, ``block_steps`` each), or "both", one after the other. ``steps`` of ``batch`` sequences
    each; None: as many as ``minutes`` of the end-to-end stage allow, measured on the first. ``train``:
    "codes" (the numbers behind them, scales, norms and biases) or "scales" (codes stay). ``lr``: learning
    rate of the numbers behind codes, in steps of their grid; ``value_lr``: of weights that are not quantized,
    as a share of the root mean square of their row; both for rows of 1024 inputs, of fewer they are larger in
    proportion. ``scale_lr``: of the logarithm of scales; ``plain_lr``: of norms and biases, as a share of
    their own root mean square. All rise shortly, then fall to 0 as a cosine.

    >>> RecoverySpec(minutes=10).loss
    'kl'
    """

    __pydantic_config__ = STRICT

    stage: Stage = "distill"
    steps: int | None = None
    minutes: float | None = None
    batch: int = 8
    train: Trained = "codes"
    loss: LossName = "kl"
    lr: float = 1e-3
    value_lr: float = 1e-3
    scale_lr: float = 5e-4
    plain_lr: float = 5e-4
    block_steps: int = 200

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise InputError(f"steps {self.steps} must be at least 1")
        if self.minutes is not None and not self.minutes > 0:
            raise InputError(f"minutes {self.minutes:g} must be more than 0")
        if self.block_steps < 1:
            raise InputError(f"block_steps {self.block_steps} must be at least 1")
        if self.batch < 1:
            raise InputError(f"batch {self.batch} must be at least 1 sequence a step")
        for name in ("lr", "value_lr", "scale_lr", "plain_lr"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} {getattr(self, name):g} must not be negative")


#: How long training takes where nothing else is asked for.
TEN_MINUTES = RecoverySpec(minutes=10)


def parse_duration(text: str) -> dict[str, float | int]:
    """The ``minutes`` or the ``steps`` of a :class:`RecoverySpec`: "10min", "90s", "1.5h", "500steps".

    Raises:
        InputError: it is neither.

    >>> parse_duration("1.5h")
    {'minutes': 90.0}
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(s|min|h|steps)", text.strip())
    if match is None:
        raise InputError(f"duration {text!r}: use 10min, 90s, 1.5h or 500steps")
    number, unit = match.groups()
    if unit != "steps":
        return {"minutes": float(number) * _UNITS[unit]}
    if "." in number:
        raise InputError(f"duration {text!r}: steps are whole")
    return {"steps": int(number)}
