"""What a visit is handed: a decoder block, as it was and as it is being modified."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from srcr.engine.activations import HiddenStates
from srcr.engine.forward import (
    ForwardPass,
    halt_before_groups,
    release_weights_after,
    submodule,
)
from srcr.engine.memory import MemoryPolicy
from srcr.errors import NumericalError
from srcr.models.blockwise import Arguments, BlockSource, copy_sharing_weights
from srcr.models.experts import PRIOR_TOKENS, Routing, in_common, sample_experts
from srcr.models.matrices import MatrixRef, read_matrix, replace_matrix
from srcr.models.topology import Block, LinearGroup
from srcr.numerics import moments
from srcr.numerics.hessian import LayerStatistics
from srcr.numerics.tensors import is_finite

#: The hidden states before a block, batch by batch: of the dense model (None: it does not run; it may have
#: the first few batches only), and of the modified one.
Streams = tuple[HiddenStates | None, HiddenStates]


class BlockPair:
    """Block number ``index`` twice: dense, as it was, and modified, with both of which passes over the
    calibration batches run.

    A visit takes the ``groups`` in order: for each it may ask for :meth:`statistics`, then
    :meth:`replace` its weights. Where all passes are cached, the weights of groups behind are gone: both
    copies together never take more than one.
    """

    def __init__(
        self,
        source: BlockSource,
        index: int,
        streams: Streams,
        arguments: Sequence[list[Arguments]],
        policy: MemoryPolicy,
    ) -> None:
        self.index = index
        self.block: Block = source.topology.blocks[index]
        self._matrices: Mapping[str, MatrixRef] = source.topology.matrices
        self._policy = policy
        self._streams = streams
        self._dense = source.block(index)
        sample_experts(self._dense)
        self._modified = copy_sharing_weights(self._dense)
        count = len(streams[1])
        cached = count if policy.cached_forwards is None else policy.cached_forwards
        passes: list[list[ForwardPass]] = []
        for module, states in zip((self._dense, self._modified), streams, strict=True):
            halt_before_groups(module, self.block)
            if cached >= count and states is not None:
                release_weights_after(module, self.block, self._matrices, len(states))
            passes.append([
                ForwardPass(module, self.block, states, i, arguments[i][index], i < cached)
                for i in range(len(states))
            ] if states is not None else [])  # fmt: skip
        self._dense_passes, self._passes = passes
        self._current: dict[str, Tensor] = {}
        self._reached = -1

    @property
    def name(self) -> str:
        """The block's module name."""
        return self.block.name

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """The groups of linears, in the order they run."""
        return self.block.groups

    def weight(self, name: str) -> Tensor:
        """The dense weight of a linear, float32 [out_features, in_features]."""
        return self._weight(name).to(torch.float32)

    def replace(self, name: str, weight: Tensor) -> None:
        """Put ``weight`` [out_features, in_features] into the modified block."""
        ref = self._matrices[name]
        before = read_matrix(self._modified, ref, self.name)
        replace_matrix(self._modified, ref, weight.to(before), self.name)

    def statistics(
        self, group: LinearGroup, cross: bool, prior: float | None = None, gates: bool = False
    ) -> LayerStatistics:
        """Moments of the group's inputs, given all that was replaced before it, tokens of extreme energy
        scaled down (:func:`srcr.numerics.moments.token_scales`); with ``cross`` also those between the dense
        model's inputs and the modified one's, as they meet the dense weights. Where the dense model runs on
        part of the batches, these are of its tokens, and there is a paired Hessian of them beside that of
        all. Experts are known by the tokens that are routed to them, weighed by ``gates``, and a sample of
        all that their layer is given, which counts as ``prior`` tokens.

        Raises:
            ValueError: groups are not asked for in the order they run, each once.
            NumericalError: an input is not finite.
            SrcrError: the group did not run in a pass.
        """
        number = self._number(group)
        weighed = partial(self._weighed, group=number, prior=prior, gates=gates)
        # The passes may run on behind the group, and let go of its weights.
        self._current = {name: self._weight(name) for name in group.names}
        dense_passes = self._dense_passes if cross else []
        assert dense_passes or not cross, "cross moments need the dense stream"
        # First, so that the weights of groups behind are gone before moments come.
        for forward in (*self._passes, *dense_passes):
            if forward.cached:
                forward.run_to(number)
        self._policy.tidy()
        sums = self._zeros(cross)
        for forward, dense in zip(self._passes, dense_passes, strict=False):
            self._add_pair(sums, weighed(forward), forward, dense, number)
            dense.give_up()
            forward.give_up()
        others = self._passes[len(dense_passes) :]
        if dense_passes and others and sums.paired is None:
            sums.paired = sums.hessian.clone()
        for forward in others:
            sums.add(weighed(forward)[0], forward.routing)
            forward.give_up()
        if not sums.finish():  # in either stream
            raise NumericalError(
                f"the inputs of {group.names[0]} are not finite: the model overflows on this calibration "
                "data"
            )
        by_weight = sums.weight_cross if cross and sums.input_cross is None else None
        return LayerStatistics(sums.hessian, by_weight, sums.paired, sums.input_cross, sums.tokens)

    def output(self, batch: int) -> Tensor:
        """The hidden states [n, len, width] that the modified block gives for a batch, whose pass ends."""
        return self._passes[batch].output()

    def advance(self) -> None:
        """Put the hidden states behind the block, in both streams, in place of those before it."""
        self._current = {}
        for states, passes in zip(self._streams, (self._dense_passes, self._passes), strict=True):
            for index, forward in enumerate(passes):
                assert states is not None
                states[index] = forward.output()

    def _weight(self, name: str) -> Tensor:
        """The dense weight of a linear, as the block runs it."""
        current = self._current.get(name)
        return (
            read_matrix(self._dense, self._matrices[name], self.name)
            if current is None
            else current
        )

    def _number(self, group: LinearGroup) -> int:
        """The group's place in the block, which is behind that of every group before."""
        number = self.groups.index(group)
        if number <= self._reached:
            raise ValueError(
                f"{group.label} was asked for after {self.groups[self._reached].label}: groups are visited "
                "in the order they run, each once"
            )
        self._reached = number
        return number

    def _weighed(
        self, forward: ForwardPass, group: int, prior: float | None, gates: bool
    ) -> tuple[Tensor, Tensor | None]:
        """What a pass gives a group [tokens, width], each token times what it is multiplied by [tokens, 1]
        (None: 1), and those factors."""
        x = forward.run_to(group)
        scales = moments.token_scales(x)
        if forward.routing is not None:
            tokens = PRIOR_TOKENS * x.shape[1] if prior is None else prior
            each = tokens / (len(self._passes) * forward.routing.sampled)
            weights = forward.routing.factors(each, gates)
            scales = weights if scales is None else scales * weights
        return _scaled(x, scales), scales

    def _zeros(self, cross: bool) -> "_Sums":
        """Zeros to sum up in, for the current linears W, which share an input: X^T X, and with ``cross``
        X_d^T X, once for all; or, where those are smaller, W X_d^T X of each."""
        first = next(iter(self._current.values()))
        width, device = first.shape[1], first.device
        sums = _Sums(torch.zeros(width, width, device=device))
        if not cross:
            return sums
        if sum(len(W) for W in self._current.values()) < width:
            sums.weight_cross = {
                n: torch.zeros(W.shape, device=device) for n, W in self._current.items()
            }
        else:
            sums.input_cross = torch.zeros(width, width, device=device)
        return sums

    def _add_pair(
        self,
        sums: "_Sums",
        weighed: tuple[Tensor, Tensor | None],
        forward: ForwardPass,
        dense: ForwardPass,
        group: int,
    ) -> None:
        """Add a batch that both streams see, of which ``weighed`` are what the modified group is given, times
        factors, and those. Of experts, to which each stream routes its own tokens, cross moments are of those
        that they share."""
        x, scales = weighed
        sums.add(x, forward.routing)
        shared = self._in_common(forward, dense, group)
        places = None
        if shared is not None:
            here, places = shared
            x, scales = x[here], None if scales is None else scales[here]
            sums.add_paired(x)
        if sums.input_cross is not None:
            y = _scaled(_at(dense.run_to(group), places), scales)
            moments.accumulate(sums.input_cross, y, x)
            return
        for name, y in self._dense_outputs(dense, group):
            moments.accumulate(sums.weight_cross[name], _scaled(_at(y, places), scales), x)

    def _in_common(
        self, forward: ForwardPass, dense: ForwardPass, group: int
    ) -> tuple[Tensor, Tensor] | None:
        """Which of the tokens that a group is given in two passes are given in both; None: the same ones."""
        if forward.routing is None:
            return None
        dense.run_to(group)
        assert dense.routing is not None
        return in_common(forward.routing, dense.routing)

    def _dense_outputs(self, dense: ForwardPass, group: int) -> Iterator[tuple[str, Tensor]]:
        """``X_d W^T`` [tokens, rows] of each linear of a group: what it gives, less the bias. The pass itself
        computes it next; where it is not cached, or goes another way, it is computed from its inputs."""
        x, names = dense.run_to(group), self.groups[group].names
        outputs = dense.outputs(group, names) if dense.cached else {}
        for name in names:
            linear: nn.Module = submodule(self._dense, self.block, name)
            y = outputs[name] if name in outputs else linear(x)
            yield name, y - linear.bias if isinstance(linear.bias, Tensor) else y


def _scaled(x: Tensor, scales: Tensor | None) -> Tensor:
    """``x`` [tokens, width] times what each token is to be multiplied by (None: 1)."""
    return x if scales is None else x * scales


def _at(x: Tensor, places: Tensor | None) -> Tensor:
    """``x`` [tokens, width] at some tokens; None: at all."""
    return x if places is None else x[places]


@dataclass(eq=False)
class _Sums:
    """The moments of a group as they are summed up: X^T X of all tokens and of those that both streams see
    (None: all), cross moments, and how many tokens were routed to it (None: it is given every token)."""

    hessian: Tensor
    weight_cross: dict[str, Tensor] = field(default_factory=dict)
    input_cross: Tensor | None = None
    paired: Tensor | None = None
    tokens: int | None = None

    def add(self, x: Tensor, routing: Routing | None) -> None:
        """Add a batch [tokens, width]."""
        moments.accumulate_gram(self.hessian, x)
        if routing is not None:
            self.tokens = (self.tokens or 0) + routing.count

    def add_paired(self, x: Tensor) -> None:
        """Add the tokens [n, width] of a batch that both streams see."""
        if self.paired is None:
            self.paired = torch.zeros_like(self.hessian)
        moments.accumulate_gram(self.paired, x)

    def finish(self) -> bool:
        """Complete the sums; whether all are finite."""
        moments.mirror_(self.hessian)
        if self.paired is not None:
            moments.mirror_(self.paired)
        crossed = [*self.weight_cross.values(), self.input_cross]
        return all(is_finite(m) for m in (self.hessian, *crossed) if m is not None)
