"""How structures are removed, whatever they are, and where what is finished of it is kept."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from srcr.engine.memory import MemoryPolicy
from srcr.models.blockwise import BlockwiseModel
from srcr.plans.specs import SolverSpec
from srcr.storage.journal import Journal
from srcr.structure.choose import RemovalMethod
from srcr.structure.depth import Rows, measured_rows

#: Rows of calibration text on which KL is measured, tokens of each, and log probabilities that are held of
#: them: with a large vocabulary it is fewer rows, at least two.
ROWS, TOKENS, HELD = 8, 256, 1 << 27


@dataclass(frozen=True, eq=False)
class Setting:
    """How structures are removed: on which ``blocks``' device, with which calibration ``batches`` (the dense
    model runs on ``dense_batches`` of them), memory and ``method``; the run's ``journal``, and what decides
    its result."""

    blocks: BlockwiseModel
    batches: Sequence[Tensor]
    dense_batches: int
    policy: MemoryPolicy
    journal: Journal
    fingerprint: Mapping[str, str]
    quiet: bool
    method: RemovalMethod

    @contextmanager
    def stage_journal(self, name: str) -> Iterator[Journal]:
        """The journal of a stage, beside that of the run, with what an earlier run has finished of it."""
        folder = self.journal.folder / name
        folder.mkdir(exist_ok=True)
        with Journal(folder) as journal:
            journal.begin(self.fingerprint)
            if journal.entries:
                self.journal.retain()
            yield journal

    def measured_rows(self, blocks: BlockwiseModel, vocabulary: int) -> Rows:
        """A few rows of the calibration text, as KL is measured on them."""
        count = max(2, min(ROWS, HELD // (TOKENS * vocabulary)))
        return measured_rows(blocks, [ids[:1, :TOKENS] for ids in self.batches[:count]])

    def note(self, journal: Journal, tensors: dict[str, Tensor], **entry: Any) -> None:
        """Put what a stage has finished into its journal."""
        if not journal.entries:
            self.journal.retain()
        journal.add(tensors, **entry)


def removal_method(spec: SolverSpec) -> RemovalMethod:
    """How structures are removed where a solver goes on with what is left."""
    return RemovalMethod(dense_targets=spec.dense_targets, dampening_frac=spec.dampening_frac)
