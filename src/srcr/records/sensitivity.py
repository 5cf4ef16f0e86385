"""What each group of linears loses at each level: what ``srcr sensitivity`` writes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import AliasChoices, AliasPath, Field

from srcr.errors import InputError
from srcr.plans.specs import CompressionLevel, PruneSpec, QuantSpec, SolverSpec
from srcr.records.text import TextRecord


@dataclass(frozen=True)
class LevelLoss:
    """A level, the squared ``error`` of the group's outputs relative to their energy, and where it was
    measured ``kl``: KL(base || model with this group alone at this level), nats a token."""

    sparsity: float
    num_bits: int
    error: float
    kl: float | None = None

    @property
    def level(self) -> CompressionLevel:
        """The level."""
        return CompressionLevel(self.sparsity, self.num_bits)


@dataclass(frozen=True)
class GroupLosses:
    """The losses of a group of linears ``names``, of ``size`` weights together."""

    names: tuple[str, ...]
    size: int
    losses: tuple[LevelLoss, ...]


@dataclass(frozen=True)
class SensitivityTable:
    """What ``srcr sensitivity`` measures, and ``srcr plan`` chooses from. ``prune`` and ``quant`` say how
    levels were made; their sparsity and width count for nothing; ``embeddings`` how these are rounded."""

    base: str
    base_sha256: str
    calibration: TextRecord
    groups: Annotated[
        tuple[GroupLosses, ...], Field(validation_alias=AliasChoices("groups", "units"))
    ]
    #: Both within "treatment" in files of earlier versions.
    prune: Annotated[
        PruneSpec, Field(validation_alias=AliasChoices("prune", AliasPath("treatment", "prune")))
    ] = field(default_factory=PruneSpec)
    quant: Annotated[
        QuantSpec, Field(validation_alias=AliasChoices("quant", AliasPath("treatment", "quant")))
    ] = field(default_factory=QuantSpec)
    solver: Annotated[SolverSpec, Field(validation_alias=AliasChoices("solver", "sweep"))] = field(
        default_factory=SolverSpec
    )
    seconds: float = 0.0
    text: TextRecord | None = None
    embeddings: QuantSpec | None = None

    @property
    def levels(self) -> tuple[CompressionLevel, ...]:
        """The levels of every group.

        Raises:
            InputError: groups have different ones, or the table is empty.
        """
        levels = {tuple(loss.level for loss in group.losses) for group in self.groups}
        if len(levels) != 1:
            raise InputError("the table's groups do not all have the same levels")
        return levels.pop()

    def predicted(self) -> list[list[tuple[CompressionLevel, float]]]:
        """The loss of every level of every group in nats: measured where it was, else the group's error
        times what an error cost where it was measured (in that group, else in all)."""
        rates = [_rate(group.losses) for group in self.groups]
        known = [rate for rate in rates if rate is not None]
        common = math.exp(sum(map(math.log, known)) / len(known)) if known else 1.0
        return [
            [
                (
                    loss.level,
                    max(loss.kl, 0.0) if loss.kl is not None else (rate or common) * loss.error,
                )
                for loss in group.losses
            ]
            for group, rate in zip(self.groups, rates, strict=True)
        ]


def _rate(losses: Sequence[LevelLoss]) -> float | None:
    """KL that an error of 1 stands for: the geometric mean over a group's measured levels."""
    logs = [
        math.log(x.kl / x.error) for x in losses if x.kl is not None and x.kl > 0 and x.error > 0
    ]
    return math.exp(sum(logs) / len(logs)) if logs else None
