"""What a visit is handed: a decoder block, as it was and as it is being modified."""

from collections.abc import Iterator, Mapping, Sequence

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
from srcr.models.experts import in_common
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

    def statistics(self, group: LinearGroup, cross: bool) -> LayerStatistics:
        """Moments of the group's inputs, given all that was replaced before it, tokens of extreme energy
        scaled down (:func:`srcr.numerics.moments.token_scales`); with ``cross`` also those between the dense
        model's inputs and the modified one's, as they meet the dense weights. Where the dense model runs on
        part of the batches, these are of its tokens, and there is a paired Hessian of them beside that of
        all.

        Raises:
            ValueError: groups are not asked for in the order they run, each once.
            NumericalError: an input is not finite.
            SrcrError: the group did not run in a pass.
        """
        number = self._number(group)
        # The passes may run on behind the group, and let go of its weights.
        self._current = {name: self._weight(name) for name in group.names}
        dense_passes = self._dense_passes if cross else []
        assert dense_passes or not cross, "cross moments need the dense stream"
        # First, so that the weights of groups behind are gone before moments come.
        for forward in (*self._passes, *dense_passes):
            if forward.cached:
                forward.run_to(number)
        self._policy.tidy()
        width = self._current[group.names[0]].shape[1]
        hessian = torch.zeros(width, width, device=self._current[group.names[0]].device)
        input_cross, weight_cross = self._cross_sums() if cross else (None, {})
        paired_hessian, tokens = None, None
        for forward, dense in zip(self._passes, dense_passes, strict=False):
            x, scales = _weighed(forward, number)
            moments.accumulate_gram(hessian, x)
            shared = self._in_common(forward, dense, number)
            if shared is not None:  # experts: each stream routes its own tokens to them
                x, scales = x[shared[0]], scales if scales is None else scales[shared[0]]
                if paired_hessian is None:
                    paired_hessian = torch.zeros_like(hessian)
                moments.accumulate_gram(paired_hessian, x)
            places = None if shared is None else shared[1]
            self._add_cross(input_cross, weight_cross, dense, number, x, scales, places)
            tokens = _counted(tokens, forward)
            dense.give_up()
            forward.give_up()
        others = self._passes[len(dense_passes) :]
        if dense_passes and others and paired_hessian is None:
            paired_hessian = hessian.clone()
        if paired_hessian is not None:
            moments.mirror_(paired_hessian)
        for forward in others:
            moments.accumulate_gram(hessian, _weighed(forward, number)[0])
            tokens = _counted(tokens, forward)
            forward.give_up()
        moments.mirror_(hessian)
        sums = [hessian, *weight_cross.values(), *([] if input_cross is None else [input_cross])]
        if not all(is_finite(moment) for moment in sums):  # in either stream
            raise NumericalError(
                f"the inputs of {group.names[0]} are not finite: the model overflows on this calibration "
                "data"
            )
        by_weight = weight_cross if cross and input_cross is None else None
        return LayerStatistics(hessian, by_weight, paired_hessian, input_cross, tokens)

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

    def _cross_sums(self) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Zeros to sum up in, for the current linears W, which share an input: X_d^T X, once for all; or,
        where those are smaller, W X_d^T X of each (and None for the other)."""
        first = next(iter(self._current.values()))
        width, device = first.shape[1], first.device
        if sum(len(W) for W in self._current.values()) < width:
            return None, {n: torch.zeros(W.shape, device=device) for n, W in self._current.items()}
        return torch.zeros(width, width, device=device), {}

    def _add_cross(
        self,
        input_cross: Tensor | None,
        weight_cross: Mapping[str, Tensor],
        dense: ForwardPass,
        group: int,
        x: Tensor,
        scales: Tensor | None,
        places: Tensor | None,
    ) -> None:
        """Add a batch, of which ``x`` [tokens, width] is what the modified group is given, times ``scales``,
        to the sums of :meth:`_cross_sums`; ``places``: which of the dense pass's tokens those are (None: all)."""
        if input_cross is not None:
            moments.accumulate(input_cross, _scaled(_at(dense.run_to(group), places), scales), x)
            return
        for name, y in self._dense_outputs(dense, group):
            moments.accumulate(weight_cross[name], _scaled(_at(y, places), scales), x)

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


def _weighed(forward: ForwardPass, group: int) -> tuple[Tensor, Tensor | None]:
    """What a pass gives a group [tokens, width], each token times what it is multiplied by [tokens, 1] (None:
    1), and those factors."""
    x = forward.run_to(group)
    scales = moments.token_scales(x)
    if forward.routing is not None:
        weights = forward.routing.weights
        scales = weights if scales is None else scales * weights
    return _scaled(x, scales), scales


def _scaled(x: Tensor, scales: Tensor | None) -> Tensor:
    """``x`` [tokens, width] times what each token is to be multiplied by (None: 1)."""
    return x if scales is None else x * scales


def _at(x: Tensor, places: Tensor | None) -> Tensor:
    """``x`` [tokens, width] at some tokens; None: at all."""
    return x if places is None else x[places]


def _counted(tokens: int | None, forward: ForwardPass) -> int | None:
    """``tokens`` with those that a pass has routed to a group; None where groups are given every token."""
    return tokens if forward.routing is None else (tokens or 0) + forward.routing.count
