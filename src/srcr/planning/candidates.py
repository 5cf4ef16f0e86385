"""Candidate models, put together from levels and measured: KL(base || candidate) on a fixed text.

The base runs once. A candidate differs from the incumbent, around which a search looks, in few groups: its
hidden states before the first block that differs are known, and only what follows is run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from srcr.errors import NumericalError
from srcr.models.matrices import read_matrix, replace_matrix
from srcr.models.streaming import replaced_forward
from srcr.models.topology import LinearGroup, Topology, hidden_states
from srcr.planning.space import Assignment, measurement
from srcr.planning.specs import MeasurementSpec
from srcr.plans.specs import CompressionLevel
from srcr.records.search import Measurement

#: The weights of a group at a level: float32 [rows, cols] by full name.
LevelWeights = Callable[[LinearGroup, CompressionLevel], Mapping[str, Tensor]]


class CandidateModel:
    """``model``, whose ``groups`` of linears get the weights of one assignment after another. It is a copy of
    the base in float32 that shares its weights: none of them is changed, only put aside."""

    def __init__(
        self, model: Any, topology: Topology, groups: Sequence[LinearGroup], weights: LevelWeights
    ) -> None:
        self.model = model
        self.topology = topology
        self.groups = groups
        self._weights = weights
        self._current: Assignment = (None,) * len(self.groups)
        self._dense = {
            name: read_matrix(model, ref).detach() for name, ref in topology.matrices.items()
        }

    @property
    def width(self) -> int:
        """Numbers of a token's hidden state."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    def assign(self, assignment: Assignment) -> Assignment:
        """Put the weights of an assignment in place, where they differ; the assignment before."""
        before = self._current
        for group, old, new in zip(self.groups, before, assignment, strict=True):
            if old == new:
                continue
            weights = self._dense if new is None else self._weights(group, new)
            for name in group.names:
                like = self._dense[name]
                weight = weights[name].to(like.device, like.dtype)
                replace_matrix(self.model, self.topology.matrices[name], weight)
        self._current = assignment
        return before

    def logits(self, ids: Tensor, start: int = 0, hidden: Tensor | None = None) -> Tensor:
        """Logits float32 [n, len, vocabulary] of ``ids`` [n, len]; the blocks before ``start`` are left out,
        ``hidden`` [n, len, width] takes the place of what they give."""

        def stub(given: Tensor, *_: Any, last: bool, **__: Any) -> Any:
            states = hidden if last else given
            return self.topology.block_output(states)

        blocks = self._blocks()[:start]
        stubs = {
            block: partial(stub, last=index == start - 1) for index, block in enumerate(blocks)
        }
        with replaced_forward(stubs):
            logits: Tensor = self.model(ids.to(self.model.device), use_cache=False).logits
        return logits.float()

    def hidden_states(self, ids: Tensor) -> list[Tensor]:
        """The hidden states [n, len, width] before every block."""
        seen: list[Tensor] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])

        handles = [
            block.register_forward_pre_hook(note, with_kwargs=True) for block in self._blocks()
        ]
        with _removed(handles):
            self.logits(ids)
        return seen

    def logits_and_last_state(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits as :meth:`logits`, and the hidden states [n, len, width] behind the last block."""
        seen: list[Tensor] = []

        def note(_: nn.Module, __: Any, output: Any) -> None:
            seen.append(hidden_states(output))

        with _removed([self._blocks()[-1].register_forward_hook(note)]):
            logits = self.logits(ids)
        return logits, seen[-1]

    def _blocks(self) -> list[nn.Module]:
        return [self.model.get_submodule(block.name) for block in self.topology.blocks]


class Candidates:
    """Measures assignments on token ids ``batches`` [n, len] each."""

    def __init__(
        self, model: CandidateModel, batches: Sequence[Tensor], spec: MeasurementSpec
    ) -> None:
        self._model = model
        self._batches = batches
        self._spec = spec
        self._expected: dict[int, Tensor] = {}
        self._last_states: list[Tensor] = []
        self._incumbent: Assignment = ()
        self._states: dict[int, list[Tensor]] = {}
        numbers = {
            name: index
            for index, block in enumerate(model.topology.blocks)
            for name in block.linears()
        }
        self._block_of = [numbers[group.names[0]] for group in model.groups]

    @torch.no_grad()
    def measure(self, assignment: Assignment, pace: Sequence[float] = ()) -> Measurement:
        """The KL of an assignment. With the ``pace`` of another (its mean KL after each batch) it stops where
        it is too high, and tells what it would come to if it stayed so.

        Raises:
            NumericalError: the candidate's predictions are not finite.
        """
        self._model.assign(assignment)
        first = self._first_difference(assignment)
        factors = self._spec.give_up_at
        total = tokens = 0.0
        for number, ids in enumerate(self._batches):
            known = self._states.get(number)
            logits = (
                self._model.logits(ids, first, known[first]) if known else self._model.logits(ids)
            )
            total += self._divergence(number, logits)
            tokens += ids.shape[0] * (ids.shape[1] - 1)
            if not total < float("inf"):
                raise NumericalError(
                    "a candidate's predictions are not finite on the search's text"
                )
            limit = factors[min(number, len(factors) - 1)]
            if pace and total / tokens > limit * pace[number] and number + 1 < len(pace):
                return measurement(
                    assignment, total / tokens / pace[number] * pace[-1], complete=False
                )
        return measurement(assignment, total / tokens)

    @torch.no_grad()
    def pace(self, assignment: Assignment) -> list[float]:
        """The mean KL of an assignment after each batch."""
        self._model.assign(assignment)
        means = []
        total = tokens = 0.0
        for number, ids in enumerate(self._batches):
            total += self._divergence(number, self._model.logits(ids))
            tokens += ids.shape[0] * (ids.shape[1] - 1)
            means.append(total / tokens)
        return means

    @torch.no_grad()
    def center_on(self, assignment: Assignment) -> None:
        """Remember the hidden states of ``assignment``, around which others will be measured."""
        self._model.assign(assignment)
        self._incumbent, self._states = assignment, {}
        left = self._spec.cache_bytes
        for number, ids in enumerate(self._batches):
            left -= ids.numel() * self._model.width * 4 * len(self._model.topology.blocks)
            if left < 0:
                break
            self._states[number] = self._model.hidden_states(ids)

    def _first_difference(self, assignment: Assignment) -> int:
        """The first block that differs from the incumbent."""
        for block, level, other in zip(self._block_of, assignment, self._incumbent, strict=False):
            if level != other:
                return block
        return len(self._model.topology.blocks) - 1 if self._incumbent else 0

    def _divergence(self, number: int, logits: Tensor) -> float:
        """KL(base || candidate) in nats of a batch with these ``logits``, summed over its tokens."""
        candidate = logits[:, :-1].log_softmax(-1)
        base = self._base(number)
        each = (base.exp() * (base - candidate)).sum(-1)
        return float(each.sum(dtype=torch.float64))

    def _base(self, number: int) -> Tensor:
        """The base's log probabilities of a batch; held as far as the cache goes, else computed from its last
        hidden states."""
        if not self._last_states:
            self._run_base()
        if number in self._expected:
            return self._expected[number]
        count = len(self._model.topology.blocks)
        logits = self._model.logits(self._batches[number], count, self._last_states[number])
        return logits[:, :-1].log_softmax(-1)

    def _run_base(self) -> None:
        """Run the base once, whatever weights the model has now."""
        before = self._model.assign((None,) * len(self._model.groups))
        left = self._spec.cache_bytes
        for number, ids in enumerate(self._batches):
            logits, state = self._model.logits_and_last_state(ids)
            self._last_states.append(state)
            expected = logits[:, :-1].log_softmax(-1)
            left -= expected.nbytes
            if left > 0:
                self._expected[number] = expected
        self._model.assign(before)


@contextmanager
def _removed(handles: Sequence[Any]) -> Iterator[None]:
    """Remove hooks when this closes."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
