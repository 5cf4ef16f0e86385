"""walk(): the one streaming loop over decoder blocks.

Compression, sensitivity and blockwise recovery are all *visits*: functions that are handed one block,
ask for the statistics they need, and may replace weights. Two streams of activations run side by side,
through the dense blocks and through the modified ones, so that each layer is solved for the inputs it
will really see, against the outputs the dense model would have given.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from srcr.errors import NumericalError
from srcr.models.topology import Unit, linear_weight
from srcr.models.weights import Arguments, WeightSource
from srcr.numerics import hessian
from srcr.types import LayerStats

R = TypeVar("R")


class Watcher(Protocol):
    """What the engine tells of its progress."""

    def step(self, block: int, what: str) -> None:
        """Work on ``what`` of block number ``block`` begins."""
        ...


@dataclass(frozen=True, eq=False)
class Batch:
    """The hidden states of some sequences before a block, in both streams (the same tensor as long as
    nothing was modified), and the arguments of every block."""

    dense: Tensor
    modified: Tensor
    arguments: list[Arguments]


class _Reached(Exception):  # noqa: N818 - not an error: the input was seen, the rest need not run
    pass


@dataclass(frozen=True, eq=False)
class BlockView:
    """What a visit is handed: one block, twice (``dense`` as it was, ``work`` to be modified)."""

    index: int
    name: str
    units: tuple[Unit, ...]
    dense: nn.Module
    work: nn.Module
    batches: Sequence[Batch]
    watcher: Watcher

    def full_name(self, linear: str) -> str:
        """The module name of a linear within the model."""
        return f"{self.name}.{linear}"

    def weight(self, linear: str) -> Tensor:
        """The dense weight of a linear, float32 [out_features, in_features]."""
        return linear_weight(self.dense.get_submodule(linear))

    def replace(self, linear: str, weight: Tensor) -> None:
        """Put ``weight`` [out_features, in_features] into the modified block."""
        linear_weight(self.work.get_submodule(linear)).copy_(weight)

    def statistics(self, unit: Unit, cross: bool) -> LayerStats:
        """Moments of the unit's inputs, given all that was replaced before it; with ``cross`` also
        those between the dense model's inputs and the modified one's.

        Raises:
            NumericalError: an input is not finite.
        """
        self.watcher.step(self.index, unit.names[0])
        first = unit.names[0]
        width = self.weight(first).shape[1]
        device = self.batches[0].modified.device
        moment = torch.zeros(width, width, device=device)
        crossed = torch.zeros(width, width, device=device) if cross else None
        n_tokens = 0
        for batch in self.batches:
            x = self._input(self.work, first, batch.modified, batch.arguments)
            hessian.accumulate(moment, x, x)
            if crossed is not None:
                dense = self._input(self.dense, first, batch.dense, batch.arguments)
                hessian.accumulate(crossed, dense, x)
            n_tokens += len(x)
        if not bool(torch.isfinite(moment).all()):
            raise NumericalError(
                f"the inputs of {self.full_name(first)} are not finite: the model overflows on this "
                "calibration data"
            )
        return LayerStats(moment, n_tokens, crossed)

    def _input(
        self, block: nn.Module, linear: str, hidden: Tensor, args: list[Arguments]
    ) -> Tensor:
        """What ``linear`` is given when ``block`` runs on ``hidden``: [tokens, width]."""
        seen: list[Tensor] = []

        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            seen.append(inputs[0])
            raise _Reached

        handle = block.get_submodule(linear).register_forward_pre_hook(hook)
        try:
            self._run(block, hidden, args)
        except _Reached:
            pass
        finally:
            handle.remove()
        return seen[0].reshape(-1, seen[0].shape[-1])

    def _run(self, block: nn.Module, hidden: Tensor, arguments: list[Arguments]) -> Tensor:
        args, kwargs = arguments[self.index]
        output = block(hidden, *args, **kwargs)
        result = output[0] if isinstance(output, tuple) else output
        assert isinstance(result, Tensor)
        return result

    def advance(self) -> list[Batch]:
        """The hidden states before the next block, in both streams."""
        self.watcher.step(self.index, "forward")
        moved = []
        for batch in self.batches:
            dense = self._run(self.dense, batch.dense, batch.arguments)
            modified = self._run(self.work, batch.modified, batch.arguments)
            moved.append(Batch(dense, modified, batch.arguments))
        return moved


Visit = Callable[[BlockView], R]


@torch.no_grad()
def walk(
    source: WeightSource, batches: Sequence[Tensor], visit: Visit[R], watcher: Watcher
) -> Iterator[R]:
    """Visit every decoder block in order and yield what each visit returns.

    ``batches`` are token ids [n, len]. Inputs of the first block are computed once; after a visit the
    modified block is run again so that later blocks see what it really gives.
    """
    states = []
    for ids in batches:
        hidden, arguments = source.embed(ids)
        states.append(Batch(hidden, hidden, arguments))
    count = len(source.topology.blocks)
    for index, block in enumerate(source.topology.blocks):
        dense, work = source.block(index), source.block(index)
        view = BlockView(index, block.name, block.units, dense, work, states, watcher)
        result = visit(view)
        if index + 1 < count:
            states = view.advance()
        yield result
