"""How a search goes: what it may use, how candidates are proposed and measured, and when it ends."""

from dataclasses import dataclass, field
from pathlib import Path

from srcr.errors import InputError
from srcr.plans.objective import Objective
from srcr.plans.recovery import RecoverySpec
from srcr.plans.structures import StructureSpec

#: Sparsities and widths that a layer may have where none are named.
SPARSITIES: tuple[float, ...] = (0.0, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5)
BITS: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
#: Finalists besides uniform ones that prune: quantized alone, allocated, searched.
OTHER_FINALISTS = 3


@dataclass(frozen=True)
class Resources:
    """What the work may use: the folder of the level ``database`` (None: beside the work) and how many bytes
    it may take, and the address of a ``ray`` cluster (None: this process)."""

    database: str | Path | None = None
    database_limit: int | None = None
    ray: str | None = None


@dataclass(frozen=True)
class MeasurementSpec:
    """How a candidate is measured on the search text, in so many ``batches``. It is given up after the first,
    second, ... of them where it loses so many times as much as the incumbent (``give_up_at``; the last number
    holds for what follows): the more has been seen, the less it can still turn. ``cache_bytes``: at most so
    much of the incumbent's hidden states, of the base's predictions, and of dequantized levels is held in
    memory, each; what is not held is computed again, to the same result."""

    batches: int = 4
    give_up_at: tuple[float, ...] = (1.1, 1.05, 1.03)
    cache_bytes: int = 1 << 29

    def __post_init__(self) -> None:
        if self.batches < 1 or not self.give_up_at:
            raise InputError("measuring takes at least one batch, and a factor to give up at")


@dataclass(frozen=True)
class ExplorationSpec:
    """How candidates are proposed. ``generation``: so many at a time from the same knowledge, so that workers
    have something to share out. ``patience``: so many generations without a new candidate end the search: the
    draws have then gathered where everything is known. ``outlier_factor``: what loses so many times as much
    as the best is not learnt from, as it says nothing of what is near the best. ``resolution``: partial
    choices that stay while a proposal is solved; the final allocation has eight times as many. ``probes``:
    levels at which each group is measured alone, fewer where that would take more than half of all trials.
    ``joint_uniform``: uniform configurations that prune and quantize among the finalists, the best by what
    was measured."""

    generation: int = 16
    patience: int = 3
    outlier_factor: float = 4.0
    resolution: int = 512
    probes: int = 3
    joint_uniform: int = 1

    @property
    def final_resolution(self) -> int:
        """Partial choices that stay while what becomes a finalist is solved."""
        return 8 * self.resolution


@dataclass(frozen=True)
class SearchSpec:
    """How long to search, and with what: ``trials`` candidates measured; Optuna's ``storage`` (a database
    URL; None: SQLite beside the work) and its ``study`` (None: named by the settings, so that processes with
    the same ones share it); the ``resources`` it may use; the ``objective`` that finalists are chosen by;
    ``tcr_precision``: to so much of TCr the smallest model under a constraint is found, the 0.5 % by which a
    target may be missed; ``recovery``: how the chosen model is trained; ``structures``: what is removed whole
    from finalists beside those of which nothing is, one of each."""

    trials: int = 200
    storage: str | None = None
    study: str | None = None
    resources: Resources = field(default_factory=Resources)
    objective: Objective = field(default_factory=Objective)
    exploration: ExplorationSpec = field(default_factory=ExplorationSpec)
    measurement: MeasurementSpec = field(default_factory=MeasurementSpec)
    tcr_precision: float = 0.005
    recovery: RecoverySpec | None = None
    structures: tuple[StructureSpec, ...] = ()

    @property
    def finalists(self) -> int:
        """How many finalists there are at most."""
        return OTHER_FINALISTS + self.exploration.joint_uniform + len(self.structures)

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise InputError(f"trials {self.trials} must be at least 1")
        if not 1e-4 <= self.tcr_precision < 1:  # records keep TCr to four digits
            raise InputError(f"tcr_precision {self.tcr_precision} must be from 0.0001 to 1")
