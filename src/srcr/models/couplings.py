"""What can be removed whole, and which rows and columns of which parameters go with it.

Seen by watching: a model runs on stand-ins, with every linear's output cut off from what made it. The
gradient of a few columns of a linear's input then says which rows of which linears those columns are made of.
Numbers of the config (key-value heads) only say which columns to ask for; what is seen must agree, or there
is no coupling.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from srcr.models.experts import sampling
from srcr.models.matrices import MatrixRef
from srcr.models.stand_ins import stand_ins
from srcr.models.streaming import device_of
from srcr.models.topology import Block, Coupling, Kind, Port, Topology, hidden_states

#: What a model is watched on: sequences of so many tokens.
SEQUENCES, TOKENS = 2, 16
#: Elements that are looked at of a coupling that has many.
SAMPLED = 16


@dataclass(frozen=True, eq=False)
class _Watched:
    """A forward pass: what each linear was given, its output as a leaf of the graph, the other vectors of
    the model, the hidden states that each block was given, as a leaf, and those it gave."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    vectors: dict[str, nn.Parameter] = field(default_factory=dict)
    entered: dict[str, Tensor] = field(default_factory=dict)
    blocks: dict[str, Tensor] = field(default_factory=dict)


@torch.enable_grad()
def find_couplings(model: Any, topology: Topology) -> tuple[Coupling, ...]:
    """Every coupling of a model, block by block."""
    watched = _watch(model, topology)
    heads = _head_count(model.config)
    couplings: list[Coupling] = []
    for block in topology.blocks:
        for group in block.groups:
            if topology.routed(group.names[0]):  # experts go whole
                continue
            for kind, size in _hypotheses(topology, group.names, heads):
                coupling = _coupling(kind, size, block, group.names, topology, watched)
                if coupling is not None:
                    couplings.append(coupling)
                    break
        layer = _layer(block, topology, watched)
        if layer is not None:
            couplings.append(layer)
    return tuple(couplings)


def _watch(model: Any, topology: Topology) -> _Watched:
    watched = _Watched()
    names = set(topology.linears())

    def on_linear(name: str, x: Tensor, y: Tensor) -> Tensor:
        if name not in names:
            return y
        watched.inputs[name] = x
        watched.outputs[name] = y.detach().requires_grad_(True)
        return watched.outputs[name].clone()  # some models add to it in place, which a leaf refuses

    handles = []
    for block in topology.blocks:

        def on_entry(
            _: nn.Module, args: tuple[Any, ...], name: str = block.name
        ) -> tuple[Any, ...]:
            watched.entered[name] = args[0].detach().requires_grad_(True)
            return watched.entered[name].clone(), *args[1:]

        def on_exit(_: nn.Module, __: Any, output: Any, name: str = block.name) -> None:
            watched.blocks[name] = hidden_states(output)

        module = model.get_submodule(block.name)
        handles += [
            module.register_forward_pre_hook(on_entry),
            module.register_forward_hook(on_exit),
        ]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(SEQUENCES * TOKENS).view(SEQUENCES, TOKENS) * 11 + 2) % vocabulary
    try:
        with stand_ins(model, on_linear, watched.vectors), sampling(model):
            model(ids.to(device_of(model)), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return watched


def _head_count(config: Any) -> int | None:
    """Key-value heads by the config."""
    text = config.get_text_config()
    for name in ("num_key_value_heads", "num_attention_heads"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _hypotheses(
    topology: Topology, names: Sequence[str], heads: int | None
) -> list[tuple[Kind, int]]:
    """What the columns of a group's input may be: a channel each, or heads of equal width."""
    width = topology.shapes[names[0]][1]
    hypotheses: list[tuple[Kind, int]] = [("channels", width)]
    if heads is not None and width % heads == 0:
        hypotheses.append(("heads", heads))
    return hypotheses


def _coupling(
    kind: Kind,
    size: int,
    block: Block,
    consumers: Sequence[str],
    topology: Topology,
    watched: _Watched,
) -> Coupling | None:
    """The coupling of ``size`` elements whose columns are those of the input of ``consumers``; None where
    what is seen is not of that form."""
    x = watched.inputs[consumers[0]]
    stride = x.shape[-1] // size
    leaves = _leaves(block, consumers, watched)
    elements = sorted({*range(min(size, SAMPLED)), size // 2, size - 1})
    supports: dict[int, dict[str, list[tuple[int, int]]]] = {}
    for element in elements:
        support = _support(x[..., element * stride : (element + 1) * stride], leaves)
        if support:
            supports[element] = support
    entries = {name: leaf.shape[-1] for name, leaf in leaves.items()}
    producers = _ports(supports, entries, watched.outputs.keys())
    if producers is None or not any(name in watched.outputs for name, *_ in producers):
        return None
    if _used_elsewhere(producers, size, block, consumers, watched):
        return None
    ports = []
    for name, offset, run in producers:
        parameters = _row_parameters(name, topology, watched)
        ports += [Port(parameter, axis, run, offset) for parameter, axis in parameters]
    return Coupling(
        kind,
        block.name,
        tuple(ports),
        tuple(_column_port(topology.matrices[name], stride) for name in consumers),
        size,
    )


def _leaves(block: Block, consumers: Sequence[str], watched: _Watched) -> dict[str, Tensor]:
    """What the input of ``consumers`` may be made of: outputs of the block's linears and its vectors, by
    name."""
    outputs = {n: watched.outputs[n] for n in block.linears() if n not in consumers}
    inside = f"{block.name}."
    vectors = {n: v for n, v in watched.vectors.items() if n.startswith(inside)}
    return outputs | vectors


def _support(x: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, list[tuple[int, int]]]:
    """The runs (first, last + 1) of entries of each leaf that the columns ``x`` depend on."""
    gradients = _gradients([x], leaves)
    return {name: _runs(gradient > 0) for name, gradient in gradients.items() if gradient.any()}


def _gradients(tensors: Iterable[Tensor], leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How much ``tensors`` depend on each entry [n] of each leaf, those they are not made of left out."""
    depends = [tensor for tensor in tensors if tensor.requires_grad]
    if not depends:
        return {}
    weights = [
        torch.randn(x.shape, generator=torch.Generator().manual_seed(x.shape[-1])).to(x)
        for x in depends
    ]
    gradients = torch.autograd.grad(
        depends, list(leaves.values()), weights, retain_graph=True, allow_unused=True
    )
    return {
        name: gradient.reshape(-1, gradient.shape[-1]).abs().sum(0).cpu()
        for name, gradient in zip(leaves, gradients, strict=True)
        if gradient is not None
    }


def _used_elsewhere(
    producers: Sequence[tuple[str, int, int]],
    size: int,
    block: Block,
    consumers: Sequence[str],
    watched: _Watched,
) -> bool:
    """Whether other linears of the block, or what comes behind it, are given what the producers give."""
    others = [watched.inputs[name] for name in block.linears() if name not in consumers]
    leaves = {name: watched.outputs[name] for name, *_ in producers if name in watched.outputs}
    gradients = _gradients([*others, watched.blocks[block.name]], leaves)
    return any(
        bool(gradients[name][offset : offset + size * stride].any())
        for name, offset, stride in producers
        if name in gradients
    )


def _runs(touched: Tensor) -> list[tuple[int, int]]:
    """The runs (first, last + 1) of True in ``touched`` [n]."""
    edges = torch.diff(touched.int(), prepend=torch.zeros(1).int(), append=torch.zeros(1).int())
    starts, stops = (edges == 1).nonzero().view(-1), (edges == -1).nonzero().view(-1)
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def _ports(
    supports: Mapping[int, Mapping[str, list[tuple[int, int]]]],
    entries: Mapping[str, int],
    linears: Collection[str],
) -> list[tuple[str, int, int]] | None:
    """(name, offset, stride) of every run that moves with the element; None where a leaf's runs do not, or
    where every element depends on all of a linear's output."""
    if len(supports) < 2:
        return None
    first = min(supports)
    ports = []
    for name in {name for support in supports.values() for name in support}:
        if (
            name in linears
            and entries[name] > 1
            and all(support.get(name) == [(0, entries[name])] for support in supports.values())
        ):
            return None
        if all(support.get(name) == supports[first].get(name) for support in supports.values()):
            continue  # the same entries for each: the element does not own them
        if name not in linears and _is_shared(name, supports):
            continue
        runs = supports[first].get(name, [])
        for number, (start, stop) in enumerate(runs):
            stride = stop - start
            offset = start - first * stride
            for element, support in supports.items():
                expected = offset + element * stride
                there = support.get(name, [])
                if len(there) != len(runs) or there[number] != (expected, expected + stride):
                    return None
            ports.append((name, offset, stride))
    return sorted(ports) or None


def _is_shared(name: str, supports: Mapping[int, Mapping[str, list[tuple[int, int]]]]) -> bool:
    """Whether several elements depend on the same entries of a vector, and none on others: for numbers above
    zero only, say."""
    seen = [support[name] for support in supports.values() if name in support]
    return len(seen) > 1 and all(runs == seen[0] for runs in seen)


def _row_parameters(name: str, topology: Topology, watched: _Watched) -> list[tuple[str, int]]:
    """The parameters whose entries along an axis are the outputs of a linear: its weight and bias; or the
    vector itself."""
    if name not in topology.matrices:
        return [(name, 0)]
    ref = topology.matrices[name]
    bias = f"{name}.bias"
    rows = [(ref.parameter, _axis(ref, 0))]
    return rows + ([(bias, 0)] if bias in watched.vectors else [])


def _column_port(ref: MatrixRef, stride: int) -> Port:
    return Port(ref.parameter, _axis(ref, 1), stride)


def _axis(ref: MatrixRef, axis: int) -> int:
    """The axis of the stored tensor that is ``axis`` of the matrix."""
    axis = 1 - axis if ref.transposed else axis
    return axis if ref.index is None else axis + 1


def _layer(block: Block, topology: Topology, watched: _Watched) -> Coupling | None:
    """The block as a whole: the linears whose outputs reach the residual stream without passing another. None
    where the block does more to it than add."""
    entered, output = watched.entered[block.name], watched.blocks[block.name]
    leaves = {name: watched.outputs[name] for name in block.linears()}
    ports = []
    for name in _gradients([output], leaves):
        rows = topology.shapes[name][0]
        parameters = _row_parameters(name, topology, watched)
        ports += [Port(parameter, axis, rows) for parameter, axis in parameters]
    weights = torch.linspace(1, 2, output.numel()).view(output.shape).to(output)
    passed = torch.autograd.grad(output, entered, weights, retain_graph=True, allow_unused=True)[0]
    if passed is None or not torch.allclose(passed, weights):
        return None
    return Coupling("layers", block.name, tuple(ports), (), 1)
