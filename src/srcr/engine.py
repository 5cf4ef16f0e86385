"""walk(): the one streaming loop over decoder blocks.

Compression, sensitivity and blockwise recovery are all *visits*: functions that are handed one block,
ask for the statistics they need, and may replace weights. Two streams of activations run side by side,
through the dense blocks and through the modified ones, so that each layer is solved for the inputs it
will really see, against the outputs the dense model would have given.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from srcr import memory
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


@dataclass(frozen=True)
class Room:
    """What the engine may hold; results do not depend on it. ``waiting``: in how many batches forward
    passes may wait within a block (None: in all); the others are begun again for every unit.
    ``folder``: where hidden states lie between blocks (None: in memory). ``keeps``: whether
    what a step has freed is left to the allocator, for the next."""

    waiting: int | None = None
    folder: Path | None = None
    keeps: bool = False

    def tidy(self) -> None:
        """Between steps, whose needs differ: give back to the system what is free, unless it is kept."""
        if not self.keeps:
            memory.release()


class States(Protocol):
    """The hidden states of each batch before a block, [n, len, width] each, one batch after the other."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor: ...

    def __setitem__(self, index: int, value: Tensor, /) -> None: ...

    def append(self, value: Tensor, /) -> None:
        """Those of one more batch."""
        ...


class Spool:
    """:class:`States` in a file, of which one batch at a time is in memory. The file has no name: nothing
    is left of it however the process ends. A context manager.

    Raises:
        OSError: the disk refuses.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed with this
        self._device = device
        self._places: list[tuple[int, torch.Size, torch.dtype]] = []

    def __enter__(self) -> "Spool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int, /) -> Tensor:
        start, shape, dtype = self._places[index]
        found = torch.empty(shape, dtype=dtype)
        self._file.seek(start)
        self._file.readinto(_bytes(found))
        return found.to(self._device)

    def __setitem__(self, index: int, value: Tensor, /) -> None:
        start, shape, dtype = self._places[index]
        assert (value.shape, value.dtype) == (shape, dtype)
        self._file.seek(start)
        self._file.write(_bytes(value.cpu().contiguous()))

    def append(self, value: Tensor, /) -> None:
        end = 0
        if self._places:
            start, shape, dtype = self._places[-1]
            end = start + dtype.itemsize * shape.numel()
        self._places.append((end, value.shape, value.dtype))
        self[-1] = value


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    found: memoryview = tensor.view(-1).view(torch.uint8).numpy().data
    return found


class _Forward(greenlet):  # type: ignore[misc]
    """A forward pass, and the outputs ``wanted`` of it: of linears by their names, None until they run."""

    def __init__(self, run: Callable[[], Any]) -> None:
        super().__init__(run)
        self.wanted: dict[str, Tensor | None] = {}


class _Pass:
    """The forward pass of a block over one batch; it halts before each unit.

    The pass is a coroutine: a hook on a unit's first linear hands its input over and waits. So what a
    later unit is given is computed with whatever was put in place of the earlier ones. A pass that
    ``waits`` keeps what it has computed so far, and computes nothing twice; another gives it up when it
    has been asked, and begins again the next time.
    """

    def __init__(
        self, block: nn.Module, states: States, index: int, arguments: Arguments, waits: bool
    ) -> None:
        args, kwargs = arguments
        self.waits = waits
        self._begin: Callable[[], _Forward] = lambda: _Forward(
            lambda: block(states[index], *args, **kwargs)
        )
        self._forward: _Forward | None = None
        self._reached = -1
        self._x: Tensor | None = None
        self._result: Any = None

    def run_to(self, unit: int) -> Tensor:
        """Run on until the linears of ``unit`` are about to run; their input as [tokens, width]."""
        if self._forward is None:
            self._forward = self._begin()
        while self._reached < unit:
            self._x = None
            self._reached, self._x = self._forward.switch()
        assert self._x is not None, "units are visited in the order they run"
        return self._x.reshape(-1, self._x.shape[-1])

    def outputs(self, unit: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Run on until the linears of ``unit`` have run; what those of ``names`` gave as [tokens, rows],
        as far as they run before the next unit."""
        self.run_to(unit)
        assert self._forward is not None
        self._forward.wanted = dict.fromkeys(names)
        self._x = None
        found = self._forward.switch()
        if self._forward.dead:
            self._result = found
        else:
            self._reached, self._x = found
        given, self._forward.wanted = self._forward.wanted, {}
        return {name: y.reshape(-1, y.shape[-1]) for name, y in given.items() if y is not None}

    def give_up(self) -> None:
        """Let go of everything, unless the pass waits."""
        if self._forward is not None and not self.waits:
            self._forward.throw()
            self._forward, self._reached, self._x = None, -1, None

    def output(self) -> Tensor:
        """Run to the end; the block's hidden states."""
        forward = self._begin() if self._forward is None else self._forward
        result = self._result
        self._forward = self._x = self._result = None
        while not forward.dead:
            result = forward.switch()
        if isinstance(result, tuple):
            result = result[0]
        assert isinstance(result, Tensor)
        return result


def _halt_at(block: nn.Module, units: Sequence[Unit]) -> None:
    """Make passes through ``block`` halt before each unit, and note what is wanted of its linears (and
    leave other calls alone)."""

    def halt(_: nn.Module, inputs: tuple[Any, ...], unit: int) -> None:
        caller = getcurrent().parent
        if caller is not None:
            caller.switch((unit, inputs[0]))

    def note(_: nn.Module, __: Any, output: Tensor, name: str) -> None:
        current = getcurrent()
        if isinstance(current, _Forward) and name in current.wanted:
            current.wanted[name] = output

    for index, unit in enumerate(units):
        first = block.get_submodule(unit.names[0])
        first.register_forward_pre_hook(partial(halt, unit=index))
        for name in unit.names:
            block.get_submodule(name).register_forward_hook(partial(note, name=name))


def _let_go(block: nn.Module, units: Sequence[Unit], passes: int) -> None:
    """Drop a linear's weight when the last of so many passes has used it: each runs once in a pass."""
    for name in (name for unit in units for name in unit.names):
        module, left = block.get_submodule(name), [passes]

        def hook(module: nn.Module, _: Any, __: Any, left: list[int] = left) -> None:
            if getcurrent().parent is not None:
                left[0] -= 1
                if left[0] == 0:
                    gone = linear_weight(module).new_empty(0)
                    module._parameters["weight"] = nn.Parameter(gone, False)

        module.register_forward_hook(hook)


def _cross_sums(weights: Mapping[str, Tensor]) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Zeros to sum up in, for linears W that share an input: X_d^T X, one for all; or, where those are
    smaller, W X_d^T X of each (and None for the other)."""
    first = next(iter(weights.values()))
    width, device = first.shape[1], first.device
    if sum(len(W) for W in weights.values()) < width:
        return None, {name: torch.zeros(W.shape, device=device) for name, W in weights.items()}
    return torch.zeros(width, width, device=device), {}


@dataclass(frozen=True, eq=False)
class BlockView:
    """What a visit is handed: one block, twice (``dense`` as it was, ``work`` to be modified), and the
    hidden states before it in both streams (``dense_states`` None where that stream is not asked for; they
    may be those of the first few batches only).

    A visit takes the units in order: for each it may ask for :meth:`statistics`, then :meth:`replace`
    its weights. Where all passes wait, the weights of units behind are gone: both copies together never
    take more than one.
    """

    index: int
    name: str
    units: tuple[Unit, ...]
    dense: nn.Module
    work: nn.Module
    dense_states: States | None
    states: States
    watcher: Watcher
    room: Room
    _dense_passes: list[_Pass]
    _passes: list[_Pass]
    _held: dict[str, Tensor]

    @classmethod
    def open(
        cls,
        source: WeightSource,
        index: int,
        streams: tuple[States | None, States],
        arguments: Sequence[list[Arguments]],
        watcher: Watcher,
        room: Room,
    ) -> "BlockView":
        """Load a block and set out the passes over the batches of both ``streams`` (dense, modified)."""
        block = source.topology.blocks[index]
        dense = source.block(index)
        work = copy_sharing_weights(dense)
        count = len(streams[1])
        waiting = count if room.waiting is None else room.waiting
        for module, states in zip((dense, work), streams, strict=True):
            _halt_at(module, block.units)
            if waiting >= count and states is not None:
                _let_go(module, block.units, len(states))
        dense_passes, passes = (
            [_Pass(module, states, i, arguments[i][index], i < waiting) for i in range(len(states))]
            if states is not None
            else []
            for module, states in zip((dense, work), streams, strict=True)
        )
        return cls(
            index,
            block.name,
            block.units,
            dense,
            work,
            *streams,
            watcher,
            room,
            dense_passes,
            passes,
            {},
        )

    def full_name(self, linear: str) -> str:
        """The module name of a linear within the model."""
        return f"{self.name}.{linear}"

    def weight(self, linear: str) -> Tensor:
        """The dense weight of a linear, float32 [out_features, in_features]."""
        held = self._held.get(linear)
        found = linear_weight(self.dense.get_submodule(linear)) if held is None else held
        return found.to(torch.float32)

    def replace(self, linear: str, weight: Tensor) -> None:
        """Put ``weight`` [out_features, in_features] into the modified block."""
        module = self.work.get_submodule(linear)
        set_linear_weight(module, weight.to(linear_weight(module)))

    def statistics(self, unit: Unit, cross: bool) -> LayerStats:
        """Moments of the unit's inputs, given all that was replaced before it; with ``cross`` also
        those between the dense model's inputs and the modified one's (or, where that is smaller, what
        becomes of them: ``pulled``, with the dense weights). Where the dense stream has some batches only,
        these are of its tokens, and there is a ``matched`` Hessian of them beside that of all.

        Raises:
            NumericalError: an input is not finite.
        """
        self.watcher.step(self.index, unit.names[0])
        number = self.units.index(unit)
        weights = {name: linear_weight(self.dense.get_submodule(name)) for name in unit.names}
        self._held.clear()  # the passes may run on behind the unit, and let go of its weights
        self._held.update(weights)
        dense_passes = self._dense_passes if cross else []
        assert dense_passes or not cross, "cross moments need the dense stream"
        for one in (*self._passes, *dense_passes):
            if one.waits:  # first, so that the weights of units behind are gone before moments come
                one.run_to(number)
        self.room.tidy()
        first = weights[unit.names[0]]
        moment = torch.zeros(first.shape[1], first.shape[1], device=first.device)
        whole, pulled = _cross_sums(weights) if cross else (None, {})
        n_tokens, matched, alone = 0, None, self._passes[len(dense_passes) :]
        for one, dense in zip(self._passes, dense_passes, strict=False):
            x = one.run_to(number)
            n_tokens += len(x)
            hessian.accumulate_gram(moment, x)
            self._add_cross(whole, pulled, dense, number, x)
            dense.give_up()
            one.give_up()
        if dense_passes and alone:
            matched = moment.clone()
            hessian.mirror_(matched)
        for one in alone:
            x = one.run_to(number)
            n_tokens += len(x)
            hessian.accumulate_gram(moment, x)
            one.give_up()
        hessian.mirror_(moment)
        sums = [moment, *pulled.values(), *([] if whole is None else [whole])]
        if not all(hessian.is_finite(found) for found in sums):  # in either stream
            raise NumericalError(
                f"the inputs of {self.full_name(unit.names[0])} are not finite: the model overflows on "
                "this calibration data"
            )
        named = {self.full_name(name): found for name, found in pulled.items()}
        return LayerStats(moment, n_tokens, whole, named or None, matched)

    def _add_cross(
        self, whole: Tensor | None, pulled: dict[str, Tensor], dense: _Pass, unit: int, x: Tensor
    ) -> None:
        """Add a batch, of which ``x`` [tokens, width] is what the modified unit is given, to the sums of
        :func:`_cross_sums`."""
        if whole is not None:
            hessian.accumulate(whole, dense.run_to(unit), x)
            return
        for name, y in self._dense_outputs(dense, unit):
            hessian.accumulate(pulled[name], y, x)

    def _dense_outputs(self, one: _Pass, unit: int) -> Iterator[tuple[str, Tensor]]:
        """``X_d W^T`` [tokens, rows] of each linear of a unit: what it gives, less the bias. The pass itself
        computes it next; where it does not wait, or goes another way, it is computed from its inputs."""
        x, names = one.run_to(unit), self.units[unit].names
        found = one.outputs(unit, names) if one.waits else {}
        for name in names:
            module = self.dense.get_submodule(name)
            y = found[name] if name in found else module(x)
            yield name, y - module.bias if isinstance(module.bias, Tensor) else y

    def advance(self) -> None:
        """Put the hidden states behind the block, in both streams, in place of those before it."""
        self._held.clear()
        self.watcher.step(self.index, "forward")
        for states, passes in (
            (self.dense_states, self._dense_passes),
            (self.states, self._passes),
        ):
            for index, one in enumerate(passes):
                assert states is not None
                states[index] = one.output()


def _spread(batches: Sequence[Tensor], first: int) -> list[Tensor]:
    """The same batches, so ordered that the ``first`` so many come from all over."""
    chosen = {i * len(batches) // first for i in range(first)}
    return [batches[i] for i in sorted(range(len(batches)), key=lambda i: i not in chosen)]


Visit = Callable[[BlockView], R]


@torch.no_grad()
def walk(
    source: WeightSource,
    batches: Sequence[Tensor],
    visit: Visit[R],
    watcher: Watcher,
    dense_batches: int | None = None,
    room: Room = Room(),
) -> Iterator[R]:
    """Visit every decoder block in order and yield what each visit returns.

    ``batches`` are token ids [n, len]. Inputs of the first block are computed once; after a visit the
    modified block runs on so that later blocks see what it really gives. Dense blocks run beside them on
    ``dense_batches`` of the batches, from all over (None: on all); without any, no visit may ask for cross
    moments. ``room`` trades memory for time and disk.
    """
    dense = len(batches) if dense_batches is None else min(dense_batches, len(batches))
    with ExitStack() as stack:

        def states() -> States:
            if room.folder is None:
                return []
            return stack.enter_context(Spool(room.folder, source.device))

        streams = (states() if dense else None, states())
        arguments = []
        for number, ids in enumerate(_spread(batches, dense)):
            hidden, others = source.embed(ids)
            arguments.append(others)
            streams[1].append(hidden)
            if streams[0] is not None and number < dense:
                streams[0].append(hidden)
        count = len(source.topology.blocks)
        for index in range(count):
            view = BlockView.open(source, index, streams, arguments, watcher, room)
            result = visit(view)
            if index + 1 < count:
                view.advance()
            del view  # and with it a block's weights and activations, before the next one is loaded
            room.tidy()
            yield result
