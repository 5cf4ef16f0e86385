"""The blocks that a run has finished: each in a file of the journal, until it is in the weight files of the
result, so that no weight lies on disk twice (docs/decisions/016)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

from torch import Tensor

from srcr.formats import Format, native
from srcr.formats.checkpoint import Checkpoint
from srcr.formats.verify import verify_weight
from srcr.models.blockwise import BlockwiseModel
from srcr.storage.journal import Journal
from srcr.storage.safetensors import TensorFiles


@dataclass(frozen=True, eq=False)
class BlockStore:
    """Finished blocks in a ``journal``, of a run that writes ``fmt``."""

    journal: Journal
    fmt: Format

    @cached_property
    def written(self) -> Checkpoint | None:
        """What the folder reads back to, a tensor at a time (of blocks that are not yet written there,
        nothing true); None where it has to be loaded whole, which would not show what is written later."""
        written = self.fmt.read(self.journal.folder)
        tensors = written.tensors
        return None if isinstance(tensors, BlockwiseModel) and tensors.in_memory else written

    def weights(self, number: int, names: Sequence[str]) -> Mapping[str, Tensor]:
        """The dequantized weights of a finished block."""
        if self.journal.moved(number) is not None and self.written is not None:
            return {name: self.written.weight(name) for name in names}
        files = TensorFiles(self.journal.folder, [self.journal.file(number)])
        read = partial(native.decode_from, files.entries, files.get)
        return {name: read(name).dequantize() for name in names}

    def moving(self, checkpoint: Checkpoint) -> Checkpoint:
        """A checkpoint of the journal's blocks, each of which goes once it is written."""
        return replace(checkpoint, moving=_Mover(self, checkpoint))

    def moved_names(self, checkpoint: Checkpoint) -> list[str]:
        """The compressed weights that have been moved, and were verified before."""
        blocks = enumerate(checkpoint.contents.blocks)
        return [n for i, names in blocks if self.journal.moved(i) is not None for n in names]


@dataclass(frozen=True, eq=False)
class _Mover:
    """A :class:`~srcr.formats.checkpoint.Moving` of the blocks in a store: what was written is read back and
    compared before the block's own file goes."""

    store: BlockStore
    checkpoint: Checkpoint

    def moved(self, block: int) -> Sequence[str] | None:
        return self.store.journal.moved(block)

    def move(self, block: int, places: Mapping[str, Sequence[str]]) -> None:
        journal, written = self.store.journal, self.store.written
        if written is None:
            return
        for name in self.checkpoint.contents.blocks[block]:
            verify_weight(name, self.checkpoint, written, journal.folder)
        journal.move(block, places)
