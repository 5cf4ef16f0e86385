"""The forward pass of a block over a batch; it halts before each group of linears.

The pass is a coroutine (docs/decisions/003): a hook on a group's first linear hands its input over and waits.
So what a later group is given is computed with whatever was put in place of the earlier ones.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from srcr.engine.activations import HiddenStates
from srcr.errors import SrcrError
from srcr.models.blockwise import Arguments
from srcr.models.experts import Routing, routing_of
from srcr.models.matrices import MatrixRef, read_matrix, replace_matrix
from srcr.models.topology import Block, hidden_states


class _Coroutine(greenlet):  # type: ignore[misc]
    """A forward pass, and the outputs ``wanted`` of it: of linears by their names, None until they run."""

    def __init__(self, run: Callable[[], Any]) -> None:
        super().__init__(run)
        self.wanted: dict[str, Tensor | None] = {}


class ForwardPass:
    """A pass of ``module``, a decoder block, over batch ``index``.

    A ``cached`` pass retains what it has computed so far, and computes nothing twice; another gives it up
    when it has been asked, and begins again the next time.
    """

    def __init__(
        self,
        module: nn.Module,
        block: Block,
        states: HiddenStates,
        index: int,
        arguments: Arguments,
        cached: bool,
    ) -> None:
        args, kwargs = arguments
        self.cached = cached
        self._groups = block.groups
        self._batch = index
        self._begin: Callable[[], _Coroutine] = lambda: _Coroutine(
            lambda: module(states[index], *args, **kwargs)
        )
        self._coroutine: _Coroutine | None = None
        self._reached = -1
        self._x: Tensor | None = None
        self._result: Any = None
        #: Of which tokens the input of the group is that was last run to; None: of all.
        self.routing: Routing | None = None

    def run_to(self, group: int) -> Tensor:
        """Run on until the linears of group number ``group`` are about to run; their input as
        [tokens, width].

        Raises:
            SrcrError: they do not run in this pass, or not behind the groups before them.
        """
        if self._coroutine is None:
            self._coroutine = self._begin()
        while self._reached < group:
            self._x = None
            self._advance()
            if self._coroutine.dead:
                break
        if self._reached != group or self._x is None:
            raise SrcrError(
                f"{self._groups[group].label} did not run in its turn on batch {self._batch} of the "
                "calibration data, as a part that only some inputs reach does: srcr cannot compress it"
            )
        return self._x.reshape(-1, self._x.shape[-1])

    def outputs(self, group: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Run on until the linears of the group have run; what those of ``names`` gave as [tokens, rows],
        as far as they run before the next group."""
        self.run_to(group)
        assert self._coroutine is not None
        self._coroutine.wanted = dict.fromkeys(names)
        self._x = None
        self._advance()
        outputs, self._coroutine.wanted = self._coroutine.wanted, {}
        return {name: y.reshape(-1, y.shape[-1]) for name, y in outputs.items() if y is not None}

    def give_up(self) -> None:
        """Let go of everything, unless the pass is cached."""
        if self._coroutine is not None and not self.cached:
            self._coroutine.throw()
            self._coroutine, self._reached, self._x = None, -1, None

    def output(self) -> Tensor:
        """Run to the end; the block's hidden states."""
        coroutine = self._begin() if self._coroutine is None else self._coroutine
        result = self._result
        self._coroutine = self._x = self._result = None
        while not coroutine.dead:
            result = coroutine.switch()
        states = hidden_states(result)
        assert isinstance(states, Tensor)
        return states

    def _advance(self) -> None:
        """Run on to the next group, or to the end."""
        assert self._coroutine is not None
        value = self._coroutine.switch()
        if self._coroutine.dead:
            self._result = value
        else:
            self._reached, self._x = value
            self.routing = None if self._x is None else routing_of(self._x)


def halt_before_groups(module: nn.Module, block: Block) -> None:
    """Make passes through ``module`` halt before each group of the block, and note what is wanted of its
    linears (and leave other calls alone)."""

    def halt(_: nn.Module, inputs: tuple[Any, ...], group: int) -> None:
        caller = getcurrent().parent
        if caller is not None:
            caller.switch((group, inputs[0]))

    def note(_: nn.Module, __: Any, output: Tensor, name: str) -> None:
        current = getcurrent()
        if isinstance(current, _Coroutine) and name in current.wanted:
            current.wanted[name] = output

    for number, group in enumerate(block.groups):
        first = submodule(module, block, group.names[0])
        first.register_forward_pre_hook(partial(halt, group=number))
        for name in group.names:
            submodule(module, block, name).register_forward_hook(partial(note, name=name))


def release_weights_after(
    module: nn.Module, block: Block, matrices: Mapping[str, MatrixRef], passes: int
) -> None:
    """Drop a linear's weight when the last of so many passes has used it: each runs once in a pass."""
    for name in block.linears():
        ref, left = matrices[name], [passes]
        if ref.index is not None:  # others still use the stack that it is in
            continue

        def hook(
            _: nn.Module, __: Any, ___: Any, ref: MatrixRef = ref, left: list[int] = left
        ) -> None:
            if getcurrent().parent is not None:
                left[0] -= 1
                if left[0] == 0:
                    gone = read_matrix(module, ref, block.name).new_empty(0)
                    replace_matrix(module, MatrixRef(ref.parameter), gone, block.name)

        submodule(module, block, name).register_forward_hook(hook)


def submodule(module: nn.Module, block: Block, name: str) -> nn.Module:
    """The linear called ``name`` in the model, of ``module``, which is its block."""
    return module.get_submodule(name.removeprefix(f"{block.name}."))
