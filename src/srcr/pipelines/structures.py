"""Remove whole structures before anything else: layers, experts, then heads and channels in one walk over the
blocks.

The result is an overlay on the model's weights (docs/decisions/013); what is compressed afterwards is a
smaller model as any other. Each finished block lies in a journal of its own beside the work in progress.
"""

import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from srcr.engine.block import BlockPair
from srcr.engine.walk import walk
from srcr.models.checkpoint import OpenModel
from srcr.models.topology import Coupling, LinearGroup
from srcr.models.transformed import Change, Read, TransformedSource
from srcr.pipelines.expert_removal import EXPERTS, remove_experts
from srcr.pipelines.progress import Bar, stage
from srcr.pipelines.removal import Setting
from srcr.records.run import StructureRecord
from srcr.storage.journal import Journal
from srcr.storage.safetensors import TensorFiles
from srcr.structure.choose import ConsumerProblem, Removed, remove_elements
from srcr.structure.depth import choose_layers, fold_layers, model_kl
from srcr.structure.sizes import WIDTHS, StructureSize, coupled
from srcr.transforms.smaller import Removal, narrower, shallower

#: Where the finished blocks lie, in the folder of the work in progress.
DEPTH, WIDTH = "structures-depth", "structures-width"


@dataclass(frozen=True, eq=False)
class SmallerModel:
    """A model without some structures (``opened``; itself where all stay), and the ``records`` of them."""

    opened: OpenModel
    records: tuple[StructureRecord, ...] = ()


def remove_structures(
    opened: OpenModel, sizes: Sequence[StructureSize], setting: Setting
) -> SmallerModel:
    """The model without what ``sizes`` say.

    Raises:
        NumericalError: activations overflow, or a Hessian cannot be factorised.
    """
    records: list[StructureRecord] = []
    for size in (each for each in sizes if each.kind == "layers"):
        opened, record = _remove_layers(opened, size, setting)
        records.append(record)
    for size in (each for each in sizes if each.kind == "experts"):
        opened, record = remove_experts(opened, size, setting)
        records.append(record)
    widths = [size for size in sizes if size.kind in WIDTHS]
    if widths:
        opened, narrowed = _remove_widths(opened, widths, setting)
        records += narrowed
    return SmallerModel(opened, tuple(records))


def drop_work(folder: Path) -> None:
    """Remove what the work has left in its folder."""
    for name in (DEPTH, EXPERTS, WIDTH):
        shutil.rmtree(folder / name, ignore_errors=True)


def _remove_layers(
    opened: OpenModel, size: StructureSize, setting: Setting
) -> tuple[OpenModel, StructureRecord]:
    """The model without the layers that matter least, and what they did folded into those before where that
    helps."""
    with setting.stage_journal(DEPTH) as journal:
        if not journal.entries:
            _choose_layers(opened, size, setting, journal)
        entry, path = journal.entries[0], journal.file(0)
    gone, folded = list(map(int, entry["gone"])), bool(entry["folded"])
    files = TensorFiles(path.parent, [path])
    below = _folded(opened, list(files.entries), files.get) if folded else opened
    smaller = below.transformed(shallower(below, gone))
    record = StructureRecord("layers", size.size, size.left, removed=tuple(gone), folded=folded)
    return smaller, record


def _choose_layers(
    opened: OpenModel, size: StructureSize, setting: Setting, journal: Journal
) -> None:
    """Choose, fold, measure both, and note the better."""
    blocks = setting.blocks
    with stage("layers", 1, setting.quiet) as bar:
        bar.note("whole model")
        rows = setting.measured_rows(blocks, opened.vocabulary)

        def on_step(done: int, of: int) -> None:
            bar.reach(0.8 * done / of, f"{done} of {of} without a layer")

        gone = choose_layers(blocks, rows, size.count, on_step)
        bar.reach(0.8, "folding")
        weights = fold_layers(blocks, setting.batches, gone, setting.method.dampening_frac)
        weights = {n: W.to(opened.dtype).contiguous().cpu() for n, W in weights.items()}
        losses = []
        for below in (opened, _folded(opened, list(weights), weights.__getitem__)):
            smaller = below.transformed(shallower(below, gone))
            losses.append(model_kl(blocks, rows, smaller.blockwise.on(blocks.device)))
        bar.reach(1, f"without {sorted(gone)}, KL {losses[0]:.4g}, folded {losses[1]:.4g}")
    folded = bool(weights) and losses[1] < losses[0]
    setting.note(journal, weights if folded else {}, gone=gone, folded=folded)


def _folded(opened: OpenModel, names: Sequence[str], weight: Callable[[str], Tensor]) -> OpenModel:
    """The model with the ``weight`` of some linears in place of its own."""

    def read(name: str, parameter: str, source: Read) -> Tensor:
        stored = source(parameter)
        if stored.is_meta:
            return stored
        return opened.topology.matrices[name].stored(weight(name)).to(stored).contiguous()

    refs = {name: opened.topology.matrices[name].parameter for name in names}
    changes: dict[str, Change] = {
        parameter: partial(read, name, parameter) for name, parameter in refs.items()
    }
    return opened.transformed(TransformedSource(opened.source, changes))


def _remove_widths(
    opened: OpenModel, sizes: Sequence[StructureSize], setting: Setting
) -> tuple[OpenModel, list[StructureRecord]]:
    """The model without the heads and channels that matter least, for which those that are left make up."""
    blocks = opened.blockwise.on(setting.blocks.device)
    with ExitStack() as stack:
        journal = stack.enter_context(setting.stage_journal(WIDTH))
        steps = len(blocks.topology.blocks) * (len(sizes) + 1) - 1
        bar = stack.enter_context(stage("structures", steps, setting.quiet))
        visitor = _Visitor(opened, sizes, setting, journal, bar)
        for _ in walk(
            blocks, setting.batches, visitor.visit, visitor.advance,
            setting.dense_batches, setting.policy,
        ):  # fmt: skip
            pass
        bar.reach(steps, ", ".join(str(size) for size in sizes))
        files = TensorFiles(journal.folder, journal.files())
        entries = list(journal.entries)
    couplings = {(c.kind, c.block): c for size in sizes for c in coupled(opened, size.kind)}
    removals = [
        Removal(couplings[size.kind, block], tuple(entry["elements"][size.kind]))
        for entry, block in zip(entries, opened.topology.block_names(), strict=True)
        for size in sizes
    ]
    compensated: dict[str, Change] = {
        name: partial(_from_file, files, name) for name in files.entries
    }
    smaller = opened.transformed(narrower(opened, removals, compensated))
    records = [
        StructureRecord(
            size.kind,
            size.size,
            size.left,
            errors=tuple(float(entry["errors"][size.kind]) for entry in entries),
        )
        for size in sizes
    ]
    return smaller, records


def _from_file(files: TensorFiles, name: str, _: Read) -> Tensor:
    return files.get(name)


@dataclass(frozen=True, eq=False)
class _Visitor:
    """What happens at each block: for each kind, elements are chosen at their consumers, which make up for
    them. The modified block has zeros in place of what goes, which gives the same as without it."""

    opened: OpenModel
    sizes: Sequence[StructureSize]
    setting: Setting
    journal: Journal
    bar: Bar

    def visit(self, pair: BlockPair) -> None:
        """Shrink a block, or take it over from the journal."""
        if pair.index < len(self.journal.entries):
            self._take_over(pair)
            return
        tensors: dict[str, Tensor] = {}
        elements: dict[str, list[int]] = {}
        errors: dict[str, float] = {}
        for group, size, coupling in self._planned(pair):
            self.bar.note(f"block {pair.index + 1} {size.kind}", advance=1)
            removed = self._remove(pair, group, size, coupling)
            elements[size.kind], errors[size.kind] = list(removed.elements), removed.error
            for name, weight in removed.weights.items():
                weight = weight.to(self.opened.dtype)
                pair.replace(name, weight)
                ref = self.opened.topology.matrices[name]
                left = _columns_left(coupling, removed.elements, weight.shape[1])
                tensors[ref.parameter] = ref.stored(weight[:, left]).contiguous().cpu()
            self.setting.policy.tidy()
        self.setting.note(self.journal, tensors, elements=elements, errors=errors)

    def advance(self, index: int) -> None:
        """The forward passes behind a block begin."""
        self.bar.note(f"block {index + 1} forward", advance=1)

    @cached_property
    def _by_consumer(self) -> dict[str, tuple[StructureSize, Coupling]]:
        """Every coupling of which elements go, and how many, by the name of its first consumer."""
        linears = self.opened.topology.parameters()
        return {
            linears[coupling.consumers[0].parameter]: (size, coupling)
            for size in self.sizes
            for coupling in coupled(self.opened, size.kind)
        }

    def _planned(self, pair: BlockPair) -> list[tuple[LinearGroup, StructureSize, Coupling]]:
        """The groups of a block that are consumers, in the order they run."""
        return [
            (group, *self._by_consumer[name])
            for group in pair.groups
            for name in group.names
            if name in self._by_consumer
        ]

    def _remove(
        self, pair: BlockPair, group: LinearGroup, size: StructureSize, coupling: Coupling
    ) -> Removed:
        """What goes of a group's inputs, and what makes up for it."""
        method = self.setting.method
        weights = {name: pair.weight(name) for name in group.names}
        statistics = pair.statistics(group, cross=method.dense_targets)
        problem = ConsumerProblem(weights, statistics, coupling.consumers[0].stride, size.count)
        return remove_elements(problem, method)

    def _take_over(self, pair: BlockPair) -> None:
        """Put a block as an earlier run finished it."""
        entry = self.journal.entries[pair.index]
        files = TensorFiles(self.journal.folder, [self.journal.file(pair.index)])
        for group, size, coupling in self._planned(pair):
            for name in group.names:
                ref = self.opened.topology.matrices[name]
                weight = torch.zeros_like(pair.weight(name))
                left = _columns_left(coupling, entry["elements"][size.kind], weight.shape[1])
                weight[:, left] = ref.view(files.get(ref.parameter)).to(weight)
                pair.replace(name, weight)


def _columns_left(coupling: Coupling, elements: Iterable[int], width: int) -> list[int]:
    """The columns of a coupling's consumers, which have so many, without those of some elements."""
    gone = set(coupling.consumers[0].entries(elements))
    return [column for column in range(width) if column not in gone]
