"""walk(): the one streaming loop over decoder blocks.

Compression, sensitivity and blockwise recovery are all *visits*: functions that are handed one block,
ask for the statistics they need, and may replace weights. Two streams of activations run side by side,
through the dense blocks and through the modified ones, so that each layer is solved for the inputs it
will really see, against the outputs the dense model would have given.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from srcr.errors import NumericalError
from srcr.models.topology import Unit, linear_weight, set_linear_weight
from srcr.models.weights import Arguments, WeightSource, copy_sharing_weights
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
    """The hidden states of some sequences before a block, in both streams (the same tensor before the
    first block; dense None where that stream is not asked for), and the arguments of every block."""

    dense: Tensor | None
    modified: Tensor
    arguments: list[Arguments]


class _Pass:
    """One forward pass of a block over one batch that halts before each unit.

    The pass is a coroutine: a hook on a unit's first linear hands its input over and waits. So what a
    later unit is given is computed with whatever was put in place of the earlier ones, and nothing is
    computed twice.
    """

    def __init__(self, block: nn.Module, hidden: Tensor, arguments: Arguments) -> None:
        args, kwargs = arguments
        self._forward = greenlet(lambda: block(hidden, *args, **kwargs))
        self._reached = -1

    def input_of(self, unit: int) -> Tensor:
        """Run on until the linears of ``unit`` are about to run; their input as [tokens, width]."""
        x: Tensor | None = None
        while self._reached < unit:
            self._reached, x = self._forward.switch()
        assert x is not None, "units are visited in the order they run, each once"
        return x.reshape(-1, x.shape[-1])

    def output(self) -> Tensor:
        """Run to the end; the block's hidden states."""
        result = None
        while not self._forward.dead:
            result = self._forward.switch()
        if isinstance(result, tuple):
            result = result[0]
        assert isinstance(result, Tensor)
        return result


def release_memory() -> None:
    """Give memory that is free back to the system, where its allocator would keep it (glibc)."""
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)


def _halt_at(block: nn.Module, units: Sequence[Unit]) -> None:
    """Make passes through ``block`` halt before each unit (and leave other calls alone)."""

    def hook(_: nn.Module, inputs: tuple[Any, ...], unit: int) -> None:
        caller = getcurrent().parent
        if caller is not None:
            caller.switch((unit, inputs[0]))

    for index, unit in enumerate(units):
        first = block.get_submodule(unit.names[0])
        first.register_forward_pre_hook(partial(hook, unit=index))


def _let_go(block: nn.Module, units: Sequence[Unit], passes: int) -> None:
    """Drop a linear's weight when the last of so many passes has used it: each runs once in a pass."""
    for name in (name for unit in units for name in unit.names):
        module, left = block.get_submodule(name), [passes]

        def hook(module: nn.Module, _: Any, __: Any, left: list[int] = left) -> None:
            if getcurrent().parent is not None:
                left[0] -= 1
                if left[0] == 0:
                    module._parameters["weight"] = nn.Parameter(torch.empty(0), False)

        module.register_forward_hook(hook)


@dataclass(frozen=True, eq=False)
class BlockView:
    """What a visit is handed: one block, twice (``dense`` as it was, ``work`` to be modified).

    A visit takes the units in order: for each it may ask for :meth:`statistics`, then :meth:`replace`
    its weights. Those of units behind are gone: both copies together never take more than one.
    """

    index: int
    name: str
    units: tuple[Unit, ...]
    dense: nn.Module
    work: nn.Module
    batches: Sequence[Batch]
    watcher: Watcher
    _dense_passes: list[_Pass]
    _work_passes: list[_Pass]

    @classmethod
    def open(
        cls, source: WeightSource, index: int, batches: Sequence[Batch], watcher: Watcher
    ) -> "BlockView":
        """Load a block and set out the passes over ``batches``."""
        block = source.topology.blocks[index]
        dense = source.block(index)
        work = copy_sharing_weights(dense)
        for module in (dense, work):
            _halt_at(module, block.units)
            _let_go(module, block.units, len(batches))
        return cls(
            index, block.name, block.units, dense, work, batches, watcher,
            [_Pass(dense, batch.dense, batch.arguments[index]) for batch in batches
             if batch.dense is not None],
            [_Pass(work, batch.modified, batch.arguments[index]) for batch in batches],
        )  # fmt: skip

    def full_name(self, linear: str) -> str:
        """The module name of a linear within the model."""
        return f"{self.name}.{linear}"

    def weight(self, linear: str) -> Tensor:
        """The dense weight of a linear, float32 [out_features, in_features]."""
        return linear_weight(self.dense.get_submodule(linear))

    def replace(self, linear: str, weight: Tensor) -> None:
        """Put ``weight`` [out_features, in_features] into the modified block."""
        module = self.work.get_submodule(linear)
        set_linear_weight(module, weight.to(self.weight(linear).device))

    def statistics(self, unit: Unit, cross: bool) -> LayerStats:
        """Moments of the unit's inputs, given all that was replaced before it; with ``cross`` also
        those between the dense model's inputs and the modified one's.

        Raises:
            NumericalError: an input is not finite.
        """
        self.watcher.step(self.index, unit.names[0])
        number = self.units.index(unit)
        width = self.weight(unit.names[0]).shape[1]
        device = self.batches[0].modified.device
        # All passes first: then the weights of the units behind are gone before the moments are there.
        seen = [one.input_of(number) for one in self._work_passes]
        dense = [one.input_of(number) for one in self._dense_passes] if cross else []
        release_memory()
        moment = torch.zeros(width, width, device=device)
        for x in seen:
            hessian.accumulate(moment, x, x)
        crossed = torch.zeros(width, width, device=device) if cross else None
        if crossed is not None:
            for x_dense, x in zip(dense, seen, strict=True):
                hessian.accumulate(crossed, x_dense, x)
        n_tokens = sum(len(x) for x in seen)
        if not hessian.is_finite(moment):
            raise NumericalError(
                f"the inputs of {self.full_name(unit.names[0])} are not finite: the model overflows on "
                "this calibration data"
            )
        return LayerStats(moment, n_tokens, crossed)

    def advance(self) -> list[Batch]:
        """The hidden states before the next block, in both streams."""
        self.watcher.step(self.index, "forward")
        dense: list[Tensor | None] = [one.output() for one in self._dense_passes]
        dense = dense or [None] * len(self.batches)
        work = [one.output() for one in self._work_passes]
        streams = zip(dense, work, self.batches, strict=True)
        return [Batch(before, after, batch.arguments) for before, after, batch in streams]


Visit = Callable[[BlockView], R]


@torch.no_grad()
def walk(
    source: WeightSource,
    batches: Sequence[Tensor],
    visit: Visit[R],
    watcher: Watcher,
    dense_stream: bool = True,
) -> Iterator[R]:
    """Visit every decoder block in order and yield what each visit returns.

    ``batches`` are token ids [n, len]. Inputs of the first block are computed once; after a visit the
    modified block runs on so that later blocks see what it really gives. Without ``dense_stream`` the
    dense blocks are not run beside them, and no visit may ask for cross moments.
    """
    states = []
    for ids in batches:
        hidden, arguments = source.embed(ids)
        states.append(Batch(hidden if dense_stream else None, hidden, arguments))
    count = len(source.topology.blocks)
    for index in range(count):
        view = BlockView.open(source, index, states, watcher)
        result = visit(view)
        if index + 1 < count:
            states = view.advance()
        del view  # and with it a block's weights and activations, before the next one is loaded
        yield result
