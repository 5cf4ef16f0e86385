"""Candidate models, put together from levels and measured: KL(base || candidate) on a fixed text.

The base runs once. A candidate differs from the incumbent, around which a search looks, in few units: its
hidden states before the first block that differs are known, and only what follows is run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from srcr.errors import NumericalError
from srcr.models.topology import Topology, linear_weight, set_linear_weight
from srcr.planning.levels import Decision, Level

#: A level for every decision unit, in their order; None leaves it as it is.
Choice = tuple[Level | None, ...]
#: The weights of a unit at a level: float32 [rows, cols] by full name.
Weights = Callable[[Decision, Level], Mapping[str, Tensor]]
#: Bytes of the hidden states and of the base's predictions that are kept, each.
KEPT = 1 << 29
#: A candidate that loses so many times as much as the incumbent after the first, second, ... batch is
#: looked at no further.
HOPELESS = (1.1, 1.05, 1.03)


@dataclass(frozen=True)
class Measured:
    """Mean KL in nats a token over the sequences looked at, which is all of them where ``whole``: a candidate
    that is hopeless after the first ones is looked at no further."""

    kl: float
    whole: bool = True


@dataclass(eq=False)
class Candidates:
    """Measures choices on token ids ``batches`` [n, len] each; ``model`` is the base in float32, whose
    weights are swapped meanwhile."""

    model: Any
    topology: Topology
    units: tuple[Decision, ...]
    weights: Weights
    batches: Sequence[Tensor]
    _dense: dict[str, Tensor] = field(default_factory=dict)
    _blocks: dict[Decision, int] = field(default_factory=dict)
    _now: list[Level | None] = field(default_factory=list)
    _expected: dict[int, Tensor] = field(default_factory=dict)
    _last: list[Tensor] = field(default_factory=list)
    _parent: Choice = ()
    _path: dict[int, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.topology.shapes:
            self._dense[name] = linear_weight(self._module(name)).data
        homes = {
            name: i for i, block in enumerate(self.topology.blocks) for name in block.linears()
        }
        self._blocks = {unit: homes[unit.names[0]] for unit in self.units}
        self._now = [None] * len(self.units)

    @torch.no_grad()
    def measure(self, choice: Choice, pace: Sequence[float] = ()) -> Measured:
        """The KL of a choice. With the ``pace`` of another (its mean KL after each batch) it stops where it
        is too high (``HOPELESS``), and tells what it would come to if it stayed so.

        Raises:
            NumericalError: the candidate's predictions are not finite.
        """
        self._put(choice)
        first = self._first_difference(choice)
        total = tokens = 0.0
        for number, ids in enumerate(self.batches):
            known = self._path.get(number)
            start = first if known else 0
            hidden = known[start] if known else None
            logits = self._run(ids, start, hidden)[:, :-1].log_softmax(-1)
            kl = _divergence(self._base(number, ids), logits)
            total, tokens = total + kl, tokens + ids.shape[0] * (ids.shape[1] - 1)
            if not total < float("inf"):
                raise NumericalError(
                    "a candidate's predictions are not finite on the search's text"
                )
            limit = HOPELESS[min(number, len(HOPELESS) - 1)]
            if pace and total / tokens > limit * pace[number] and number + 1 < len(pace):
                return Measured(total / tokens / pace[number] * pace[-1], whole=False)
        return Measured(total / tokens)

    @torch.no_grad()
    def pace(self, choice: Choice) -> list[float]:
        """The KL of a choice after each batch."""
        found = []
        total = tokens = 0.0
        self._put(choice)
        for number, ids in enumerate(self.batches):
            logits = self._run(ids, 0, None)[:, :-1].log_softmax(-1)
            total += _divergence(self._base(number, ids), logits)
            tokens += ids.shape[0] * (ids.shape[1] - 1)
            found.append(total / tokens)
        return found

    @torch.no_grad()
    def stand_at(self, choice: Choice) -> None:
        """Remember the hidden states of ``choice``, around which others will be measured."""
        self._put(choice)
        self._parent, self._path = choice, {}
        room = KEPT
        for number, ids in enumerate(self.batches):
            size = ids.numel() * self._width() * 4 * len(self.topology.blocks)
            if size > room:
                break
            room -= size
            seen: list[Tensor] = []
            with self._watched(seen):
                self._run(ids, 0, None)
            self._path[number] = seen

    def _module(self, name: str) -> nn.Module:
        found: nn.Module = self.model.get_submodule(name)
        return found

    def _width(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[1])

    def _put(self, choice: Choice) -> None:
        """Give the model the weights of a choice; only what differs is loaded."""
        for number, (unit, now, level) in enumerate(
            zip(self.units, self._now, choice, strict=True)
        ):
            if now == level:
                continue
            new = (
                {n: self._dense[n] for n in unit.names}
                if level is None
                else self.weights(unit, level)
            )
            for name in unit.names:
                module = self._module(name)
                like = module.weight
                assert isinstance(like, Tensor)
                set_linear_weight(module, new[name].to(like.device, like.dtype))
            self._now[number] = level

    def _first_difference(self, choice: Choice) -> int:
        """The first block that differs from the one the states are remembered of."""
        for unit, mine, theirs in zip(self.units, choice, self._parent, strict=False):
            if mine != theirs:
                return self._blocks[unit]
        return len(self.topology.blocks) - 1 if self._parent else 0

    def _base(self, number: int, ids: Tensor) -> Tensor:
        """The base's log probabilities of a batch; kept while there is room, else computed from its last
        hidden states."""
        if not self._last:
            self._learn()
        if number in self._expected:
            return self._expected[number]
        count = len(self.topology.blocks)
        return self._run(ids, count, self._last[number])[:, :-1].log_softmax(-1)

    def _learn(self) -> None:
        """Run the base once, whatever weights the model holds now."""
        now: Choice = tuple(self._now)
        self._put((None,) * len(self.units))
        room = KEPT
        for number, ids in enumerate(self.batches):
            seen: list[Tensor] = []
            with self._watched(seen, last=True):
                expected = self._run(ids, 0, None)[:, :-1].log_softmax(-1)
            self._last.append(seen[-1])
            room -= expected.nbytes
            if room > 0:
                self._expected[number] = expected
        self._put(now)

    def _run(self, ids: Tensor, start: int, hidden: Tensor | None) -> Tensor:
        """Logits of ``ids``; the blocks before ``start`` are left out, ``hidden`` takes their place."""
        blocks = [self._module(block.name) for block in self.topology.blocks]

        def stub(given: Tensor, *_: Any, last: bool, **__: Any) -> Any:
            out = hidden if last else given
            return (out,) if self.topology.tuples else out

        for index, block in enumerate(blocks[:start]):
            block.forward = partial(stub, last=index == start - 1)
        try:
            logits: Tensor = self.model(ids.to(self.model.device), use_cache=False).logits
        finally:
            for block in blocks[:start]:
                del block.forward
        return logits.float()

    @contextmanager
    def _watched(self, seen: list[Tensor], last: bool = False) -> Iterator[None]:
        """Collect the hidden states before every block; with ``last`` also those behind the last one."""
        handles = []
        blocks = [self._module(block.name) for block in self.topology.blocks]

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])

        def behind(_: nn.Module, __: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        for block in blocks if not last else []:
            handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        if last:
            handles.append(blocks[-1].register_forward_hook(behind))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _divergence(base: Tensor, candidate: Tensor) -> float:
    """KL(base || candidate) of log probabilities [n, len, vocabulary], summed over all tokens."""
    each = (base.exp() * (base - candidate)).sum(-1)
    return float(each.sum(dtype=torch.float64))
