"""Compress block by block into a journal, and what the journal then holds as a checkpoint."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from srcr.engine.block import BlockPair
from srcr.engine.memory import MemoryPolicy
from srcr.engine.walk import walk
from srcr.errors import NumericalError
from srcr.formats import native
from srcr.formats.checkpoint import Checkpoint, Contents
from srcr.formats.verify import Walked
from srcr.metrics.rates import count_zeros, entropy_bits, layer_tcr, mask_sparsity
from srcr.models.blockwise import BlockwiseModel
from srcr.models.checkpoint import OpenModel
from srcr.models.topology import LinearGroup
from srcr.numerics.compressed import CompressedWeight
from srcr.numerics.tensors import dtype_name, is_finite
from srcr.pipelines.progress import Bar, say, stage
from srcr.pipelines.store import BlockStore
from srcr.plans.plan import CompressionPlan, LayerPlan
from srcr.records.routing import routing_notes
from srcr.records.run import LayerRecord
from srcr.serialize import from_dict, to_dict
from srcr.solver.problem import LayerProblem
from srcr.solver.solve import solve
from srcr.storage.safetensors import TensorFiles


@dataclass(frozen=True, eq=False)
class Streams:
    """The model whose blocks are compressed, and the ``dense`` one whose activations they are to reproduce:
    the same where no embedding is quantized."""

    blocks: BlockwiseModel
    dense: BlockwiseModel


def compress_blocks(
    streams: Streams,
    plan: CompressionPlan,
    batches: Sequence[Tensor],
    dense_batches: int,
    policy: MemoryPolicy,
    store: BlockStore,
    quiet: bool,
) -> tuple[list[LayerRecord], Walked]:
    """The record of every compressed layer, and what the compressed blocks give for the first row. The
    weights go into the store's journal, a block at a time; blocks that it holds already are taken over."""
    blocks = streams.blocks
    count = len(blocks.topology.blocks)
    steps = sum(len(block.groups) + 1 for block in blocks.topology.blocks) - 1
    layers: list[LayerRecord] = []
    with stage("compress", steps, quiet) as bar:
        visitor = _Visitor(blocks, plan, policy, store, bar)
        for records in walk(
            blocks, batches, visitor.visit, visitor.advance, dense_batches, policy, streams.dense
        ):
            layers.extend(records)
        bar.reach(steps, f"{count} blocks, {len(layers)} layers")
    for note in routing_notes(layers):
        say(note, quiet)
    assert visitor.hidden is not None
    return layers, Walked(batches[0][:1], visitor.hidden)


@dataclass
class _Visitor:
    """What happens at each block, and what people see of it; ``error`` is the last layer's, ``hidden`` the
    hidden states [1, len, width] behind the last block, of the first row."""

    blocks: BlockwiseModel
    plan: CompressionPlan
    policy: MemoryPolicy
    store: BlockStore
    bar: Bar
    error: float | None = None
    hidden: Tensor | None = None

    def __post_init__(self) -> None:
        self._planned = self.plan.by_name()

    def visit(self, pair: BlockPair) -> list[LayerRecord]:
        """Compress a block, or take it over from the journal."""
        known = pair.index < len(self.store.journal.entries)
        records = self._take_over(pair) if known else self._compress_block(pair)
        if pair.index + 1 == len(self.blocks.topology.blocks):
            self.hidden = pair.output(0)[:1].cpu()
        return records

    def _compress_block(self, pair: BlockPair) -> list[LayerRecord]:
        done: dict[str, CompressedWeight] = {}
        tokens: dict[str, int | None] = {}
        for group in pair.groups:
            self._step(pair.index, group.names[0].removeprefix(f"{pair.name}."))
            solution, routed = self._compress(pair, group)
            done |= solution
            tokens |= dict.fromkeys(solution, routed)
            self.policy.tidy()
        records = [self._record(name, weight, tokens[name]) for name, weight in done.items()]
        layers = [to_dict(record) for record in records]
        self.store.journal.add(native.encode_all(done), layers=layers)
        return records

    def advance(self, index: int) -> None:
        """The forward passes behind a block begin."""
        self._step(index, "forward")

    def _compress(
        self, pair: BlockPair, group: LinearGroup
    ) -> tuple[dict[str, CompressedWeight], int | None]:
        """Compress the linears of a group and put them into the modified block; by name, in main memory. And
        how many tokens were routed to them (None: they are given every token)."""
        plans = {name: self._planned.get(name, LayerPlan(name)) for name in group.names}
        if all(layer.prune is None and layer.quant is None for layer in plans.values()):
            return {}, None
        weights = {name: pair.weight(name) for name in group.names}
        solver = self.plan.solver
        statistics = pair.statistics(
            group, solver.dense_targets, solver.expert_prior, bool(solver.expert_gates)
        )
        problem = LayerProblem(weights, plans, statistics, solver, self.blocks.dtype)
        with _named(group.names[0]):
            solution = solve(problem)
        for name, compressed in solution.items():
            weight = compressed.dequantize()
            if not is_finite(weight):
                dtype = dtype_name(self.blocks.dtype)
                raise NumericalError(
                    f"the compressed weights of {name} are not finite: they are too large for {dtype} "
                    "(convert the model to float32 first), or its inputs overflow on this calibration data"
                )
            pair.replace(name, weight)
            self.error = compressed.error
        return {name: weight.cpu() for name, weight in solution.items()}, statistics.tokens

    def _take_over(self, pair: BlockPair) -> list[LayerRecord]:
        """Put a block as an earlier run finished it."""
        journal = self.store.journal
        entry, where = journal.entries[pair.index], str(journal.folder)
        records = [from_dict(LayerRecord, layer, where) for layer in entry["layers"]]
        weights = self.store.weights(pair.index, [record.name for record in records])
        for name, weight in weights.items():
            pair.replace(name, weight)
        return records

    def _record(self, name: str, weight: CompressedWeight, tokens: int | None) -> LayerRecord:
        sparsity, bits = mask_sparsity(weight), self._planned[name].bits
        return LayerRecord(
            name=name,
            shape=self.blocks.topology.shapes[name],
            sparsity=sparsity,
            bits=bits,
            tcr=layer_tcr(sparsity, bits),
            zeros=count_zeros([weight.dequantize().to(self.blocks.dtype)]),
            entropy_bits=entropy_bits(weight),
            error=weight.error,
            tokens=tokens,
        )

    def _step(self, index: int, what: str) -> None:
        """Move the bar, which names the block and the last output error."""
        error = "" if self.error is None else f"  error {self.error:.2e}"
        count = len(self.blocks.topology.blocks)
        self.bar.note(f"block {index + 1}/{count} {what}{error}", advance=1)


def journaled_checkpoint(
    opened: OpenModel, contents: Contents, folder: Path, finished: Sequence[Path]
) -> Checkpoint:
    """The model with the compressed weights of the ``finished`` files in ``folder``."""
    files = TensorFiles(folder, list(finished))
    return Checkpoint.of(opened, contents, partial(native.decode_from, files.entries, files.get))


@contextmanager
def _named(layer: str) -> Iterator[None]:
    """Put the layer's name in front of a numerical error."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(f"{layer}: {error}") from error
