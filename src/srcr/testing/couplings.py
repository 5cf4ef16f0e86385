"""What every coupling must be: exactly what goes with an element, and nothing else.

Shown on the model's own matrices in float32: by gradients (which entries stop mattering when an element's
consumers are cut), by values, and by a smaller model built from a smaller config.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from srcr.errors import InputError
from srcr.models.checkpoint import ModelLike, OpenModel, load_from, open_model
from srcr.models.streaming import empty_model, replaced_forward
from srcr.models.topology import Coupling, Kind, Port
from srcr.models.transformed import TransformedSource
from srcr.testing.requirement import require
from srcr.transforms.smaller import Removal, narrower, shallower

SEQUENCES, TOKENS = 2, 24
#: How far logits that must be the same may be apart, against the largest of them.
TOLERANCE = 1e-4
#: Gradients this small against the largest may be rounding errors: of a key's bias, say, where softmax makes
#: no difference of it.
INDIFFERENT = 1e-5
#: Deviation of what is added to vectors.
NOISE = 0.1

#: Entries along an axis of a parameter: by (name, axis).
Entries = dict[tuple[str, int], set[int]]


@torch.no_grad()
def check_couplings(
    model: ModelLike, couplings: Sequence[Coupling] | None = None
) -> frozenset[Kind]:
    """The kinds of coupling for which a smaller model was built and gave the same logits: those that the
    model's config can express. ``couplings``: None for those that srcr sees.

    Raises:
        AssertionError: a port reaches past its parameter; an entry of a producer serves more than its
            element's consumers, or one that serves those alone is left out; an element with zero producers
            still counts; a smaller model differs.
    """
    opened = open_model(model)
    couplings = opened.topology.couplings if couplings is None else couplings
    in_float32 = TransformedSource(opened.source, {}, config={"dtype": torch.float32})
    own = _with_noisy_vectors(load_from(in_float32))
    subject = _Subject(open_model(own), own)
    for coupling in couplings:
        _check_ports(subject, coupling)
        if coupling.kind == "layers":
            _check_layer(subject, coupling)
            continue
        for elements in ([0], [coupling.size - 1], range(1, coupling.size, 2)):
            _check_producers(subject, coupling, elements)
            _check_consumers(subject, coupling, elements)
    kinds: tuple[Kind, ...] = ("channels", "heads", "layers")
    return frozenset(kind for kind in kinds if _check_smaller(subject, kind, couplings))


@dataclass(eq=False)
class _Subject:
    """A model in float32, as opened and itself; ``dead`` is what does not matter anyway, block by block, as
    far as it is known."""

    opened: OpenModel
    model: Any
    dead: dict[str, Entries] = field(default_factory=dict)

    def parameter(self, name: str) -> Tensor:
        tensor: Tensor = self.model.get_parameter(name).detach()
        return tensor

    def logits(self, changes: Mapping[str, Tensor], model: Any = None) -> Tensor:
        """Logits of the model (or another) with some parameters replaced."""
        ids = torch.arange(SEQUENCES * TOKENS).view(SEQUENCES, TOKENS) * 7 + 3
        arguments = (ids % self.opened.vocabulary,)
        model = self.model if model is None else model
        output = functional_call(model, dict(changes), arguments, {"use_cache": False})
        logits: Tensor = output.logits
        return logits

    def cut(self, ports: Iterable[Port], elements: Iterable[int]) -> dict[str, Tensor]:
        """The parameters of ``ports`` with the entries of some elements zero."""
        cut: dict[str, Tensor] = {}
        for port in ports:
            tensor = cut.setdefault(port.parameter, self.parameter(port.parameter).clone())
            tensor.index_fill_(port.axis, torch.tensor(port.entries(elements)), 0.0)
        return cut

    def dead_entries(
        self, block: str, changes: Mapping[str, Tensor], tolerance: float = 0.0
    ) -> Entries:
        """Rows of a block's linears, and entries of its vectors, on which the logits do not depend: their
        gradients are at most ``tolerance`` times the block's largest."""
        names = [n for n, _ in self.model.named_parameters() if n.startswith(f"{block}.")]
        leaves = {n: changes.get(n, self.parameter(n)).clone().requires_grad_(True) for n in names}
        with torch.enable_grad():
            logits = self.logits(leaves)
            weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
            gradients = torch.autograd.grad(
                (logits * weights).sum(), list(leaves.values()), materialize_grads=True
            )
        limit = tolerance * max(float(gradient.abs().max()) for gradient in gradients)
        axes = {
            ref.parameter: int(ref.transposed) for ref in self.opened.topology.matrices.values()
        }
        dead: Entries = {}
        for name, gradient in zip(names, gradients, strict=True):
            axis = axes.get(name, 0)
            largest = gradient.abs().movedim(axis, 0).reshape(gradient.shape[axis], -1).amax(1)
            dead[name, axis] = set((largest <= limit).nonzero().view(-1).tolist())
        return dead


def _with_noisy_vectors(model: Any) -> Any:
    """A copy of a model with a little noise on its vectors: where biases are 0, nothing could be seen of
    them."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=NOISE)
    return model


def _check_ports(subject: _Subject, coupling: Coupling) -> None:
    fewest = 1 if coupling.kind == "layers" else 2
    require(coupling.size >= fewest, f"{_name(coupling)}: it has {coupling.size} elements")
    names = {name for name, _ in subject.model.named_parameters()}
    for port in (*coupling.producers, *coupling.consumers):
        known = port.parameter in names
        require(known, f"{_name(coupling)}: there is no parameter {port.parameter!r}")
        shape = subject.parameter(port.parameter).shape
        inside = port.axis < len(shape) and port.offset >= 0 and port.stride > 0
        require(
            inside and port.span(coupling.size - 1).stop <= shape[port.axis],
            f"{_name(coupling)}: {coupling.size} elements of {port} reach past {list(shape)}",
        )


def _check_producers(subject: _Subject, coupling: Coupling, elements: Iterable[int]) -> None:
    """What stops mattering when the consumers' entries of some elements are cut is what the producers have
    of them, all of it and nothing else."""
    block, where = coupling.block, _name(coupling, elements)
    if block not in subject.dead:
        subject.dead[block] = subject.dead_entries(block, {}, INDIFFERENT)
    produced: Entries = {}
    for port in coupling.producers:
        produced.setdefault((port.parameter, port.axis), set()).update(port.entries(elements))
    cut = subject.cut(coupling.consumers, elements)
    dead = subject.dead_entries(block, cut)
    for (name, axis), entries in produced.items():
        alive = sorted(entries - dead.get((name, axis), set()))
        require(
            not alive,
            f"{where}: with the consumers cut, entries {alive[:5]} of the producer {name} still count: a "
            "consumer is missing, or a port is shifted",
        )
    for (name, axis), entries in dead.items():
        entries = entries - subject.dead[block][name, axis] - produced.get((name, axis), set())
        left_out = [
            e for e in sorted(entries) if not _matters(subject, cut, Port(name, axis, 1, e))
        ]
        require(
            not left_out,
            f"{where}: with the consumers cut, entries {left_out[:5]} of {name} count no more, but belong to "
            "no producer: a port is missing or shifted",
        )


def _check_consumers(subject: _Subject, coupling: Coupling, elements: Iterable[int]) -> None:
    """With the producers' entries of some elements zero, those of the consumers may be anything."""
    cut = subject.cut(coupling.producers, elements)
    other = dict(cut)
    for port in coupling.consumers:
        other |= _disturbed(subject, other, port, elements)
    require(
        _same(subject.logits(other), subject.logits(cut)),
        f"{_name(coupling, elements)}: with the producers' entries zero, those of the consumers still change "
        "the logits: a producer is missing, or a port is shifted",
    )


def _matters(subject: _Subject, changes: Mapping[str, Tensor], port: Port) -> bool:
    """Whether the logits follow the first entry of ``port``. (No gradient does not say that they do not: a
    unit may just be off, and one of two opposite changes turns it on.)"""
    before = subject.logits(changes)
    disturbed = [_disturbed(subject, changes, port, [0], factor) for factor in (3.0, -3.0)]
    return not all(_same(subject.logits({**changes, **other}), before) for other in disturbed)


def _disturbed(
    subject: _Subject,
    changes: Mapping[str, Tensor],
    port: Port,
    elements: Iterable[int],
    factor: float = 1.0,
) -> dict[str, Tensor]:
    """The parameter of ``port`` with noise, of deviation ``factor``, on the entries of some elements."""
    tensor = changes.get(port.parameter, subject.parameter(port.parameter))
    entries = torch.tensor(port.entries(elements))
    shape = tensor.index_select(port.axis, entries).shape
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return {port.parameter: tensor.index_add(port.axis, entries, noise, alpha=factor)}


def _check_layer(subject: _Subject, coupling: Coupling) -> None:
    """With its producers zero, a layer passes on what it is given."""

    def skip(hidden: Tensor, *_: Any, **__: Any) -> Any:
        return subject.opened.topology.block_output(hidden)

    with replaced_forward({subject.model.get_submodule(coupling.block): skip}):
        expected = subject.logits({})
    require(
        _same(subject.logits(subject.cut(coupling.producers, [0])), expected),
        f"{_name(coupling)}: with its producers zero, the layer is not the same as none",
    )


def _check_smaller(subject: _Subject, kind: Kind, couplings: Sequence[Coupling]) -> bool:
    """Whether the config can express removal of this kind; if so, a smaller model has been compared with
    the model whose producers are zero."""
    blocks = subject.opened.topology.blocks
    chosen = [coupling for coupling in couplings if coupling.kind == kind]
    if {c.block for c in chosen} != {block.name for block in blocks} or len(chosen) != len(blocks):
        return False  # a config has one number for all layers
    if kind == "layers":
        shown = [_check_shallower(subject, coupling) for coupling in chosen if len(blocks) > 1]
        return bool(shown) and all(shown)
    sizes = {coupling.size for coupling in chosen}
    if len(sizes) > 1 or sizes == {1}:
        return False
    size = sizes.pop()
    count = max(1, size // 3)
    gone = {c.block: [(3 * e + i) % size for e in range(count)] for i, c in enumerate(chosen)}
    removals = [Removal(c, tuple(gone[c.block])) for c in chosen]
    overlay = narrower(subject.opened, removals)
    return _compare(subject, f"{kind} of every layer", overlay, chosen, gone)


def _check_shallower(subject: _Subject, coupling: Coupling) -> bool:
    """:func:`_check_smaller` for one layer."""
    index = subject.opened.topology.block_names().index(coupling.block)
    overlay = shallower(subject.opened, [index])
    return _compare(subject, _name(coupling), overlay, [coupling], {coupling.block: [0]})


def _compare(
    subject: _Subject,
    what: str,
    overlay: TransformedSource,
    couplings: Sequence[Coupling],
    gone: Mapping[str, Sequence[int]],
) -> bool:
    """Whether transformers builds the smaller model of ``overlay``, which then must give the logits of the
    model with zeros."""
    try:
        built = empty_model(overlay)
    except InputError:
        return False
    for coupling in couplings:
        for port in coupling.consumers:
            width = subject.parameter(port.parameter).shape[port.axis]
            width = width * (coupling.size - len(gone[coupling.block])) // coupling.size
            if built.get_parameter(port.parameter).shape[port.axis] != width:
                return False  # a config without a head_dim has every head in hidden_size
    available = set(overlay.names())
    for name, parameter in built.named_parameters():
        require(name in available, f"{what} removed: the smaller model lacks {name}")
        shape = list(overlay.meta(name).shape)
        require(
            shape == list(parameter.shape),
            f"{what} removed: {name} has the shape {shape}, in the smaller model {list(parameter.shape)}: a "
            "port is missing",
        )
    zeroed: dict[str, Tensor] = {}
    for coupling in couplings:
        zeroed |= subject.cut(coupling.producers, gone[coupling.block])
    smaller = subject.logits({}, load_from(overlay, torch.float32))
    require(
        _same(smaller, subject.logits(zeroed)),
        f"{what} removed: the smaller model gives other logits than the model with zeros in the producers",
    )
    return True


def _same(left: Tensor, right: Tensor) -> bool:
    return float((left - right).abs().max()) <= TOLERANCE * float(right.abs().max())


def _name(coupling: Coupling, elements: Iterable[int] | None = None) -> str:
    name = f"{coupling.kind} of {coupling.block}"
    return name if elements is None else f"{name}, elements {list(elements)[:4]}"
