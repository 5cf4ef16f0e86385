"""What a model is made of: decoder blocks, linears that share an input, and what can be removed whole."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

from srcr.models.matrices import MatrixRef
from srcr.plans.structures import Structure

Kind = Structure
T = TypeVar("T")


@dataclass(frozen=True)
class Port:
    """Rows or columns of a parameter that belong to a coupling: along ``axis`` (of the tensor as it is
    stored), element e has the ``stride`` entries from ``offset + e * stride`` on."""

    parameter: str
    axis: int
    stride: int
    offset: int = 0

    def span(self, element: int) -> slice:
        """The entries of an element."""
        start = self.offset + element * self.stride
        return slice(start, start + self.stride)

    def entries(self, elements: Iterable[int]) -> list[int]:
        """The numbers of the entries of several elements."""
        spans = (self.span(element) for element in elements)
        return [number for span in spans for number in range(span.start, span.stop)]


@dataclass(frozen=True)
class Coupling:
    """``size`` elements that can be removed, each with its entries in every port: what ``producers`` give is
    used by ``consumers`` alone. "channels": hidden units of a feed-forward network; "heads": key-value heads
    with the query heads that share them; "layers": a whole block (its ports are those that write to the
    residual stream). Where the producers' entries are zero, removing the element changes nothing."""

    kind: Kind
    block: str
    producers: tuple[Port, ...]
    consumers: tuple[Port, ...]
    size: int


def experts_module(name: str) -> str:
    """The module of experts that a linear of one would be in: two above it."""
    return name.rsplit(".", 2)[0]


@dataclass(frozen=True)
class LinearGroup:
    """Linears that are decided on together, in the order they run: full module names. Engines fuse them: they
    share an input; or they are the same linears of all experts of a layer, of which each of the ``parts``
    shares one."""

    names: tuple[str, ...]
    parts: tuple["LinearGroup", ...] = ()

    @property
    def label(self) -> str:
        """A short name: the module that holds them, and the linears within it; "*" for several experts."""
        first, _, _ = self.names[0].rpartition(".")
        modules = {experts_module(name) for name in self.names}
        owners = {name.rpartition(".")[0] for name in self.names}
        if len(owners) > 1 and len(modules) == 1 and first.rpartition(".")[2].isdigit():
            first = f"{modules.pop()}.*"
        return f"{first}.{'/'.join(dict.fromkeys(n.rpartition('.')[2] for n in self.names))}"

    def inputs(self) -> tuple["LinearGroup", ...]:
        """The group in parts that share an input each."""
        return self.parts or (self,)


@dataclass(frozen=True)
class Block:
    """A decoder block: its module name, its groups in the order their inputs are computed, and the modules of
    experts in it."""

    name: str
    groups: tuple[LinearGroup, ...]
    experts: tuple[str, ...] = ()

    @cached_property
    def decisions(self) -> tuple[LinearGroup, ...]:
        """Its groups, with the same linears of all experts of a module as one."""
        alike: dict[tuple[str, ...], list[LinearGroup]] = {}
        for group in self.groups:
            owner = experts_module(group.names[0])
            leaves = tuple(name.rpartition(".")[2] for name in group.names)
            key = (owner, *leaves) if owner in self.experts else group.names
            alike.setdefault(key, []).append(group)
        return tuple(
            LinearGroup(tuple(n for each in groups for n in each.names), tuple(groups))
            if len(groups) > 1
            else groups[0]
            for groups in alike.values()
        )

    def linears(self) -> tuple[str, ...]:
        """Full module names of the block's linears."""
        return tuple(name for group in self.groups for name in group.names)


def hidden_states(output: Any) -> Any:
    """The hidden states among what a block returns: alone, or first of several."""
    return output[0] if isinstance(output, tuple | list) else output


@dataclass(frozen=True)
class Topology:
    """``matrices`` says where the weight of each linear of the decoder blocks lies and ``shapes`` its
    (out_features, in_features), both by full module name; ``head`` is the output embedding, ``tied`` whether
    it shares its weight with the input embedding; ``embeddings`` and ``embedding_shapes``: as the first two,
    of the input embedding and of a head of its own. ``others``: names of the tensors outside the blocks that
    a forward pass uses; ``untouched``: linears that are left as they are (outside the blocks, the head left
    out, or used otherwise than by calling them), ``stacks``: parameters of several matrices that are, too;
    ``returns``: None where a block returns its hidden states, else whether each further member of the tuple
    is a tensor; ``experts``: how many each module of experts holds, by its name; ``stored``: where tensors
    lie in a checkpoint that has them under other names or in stacks."""

    blocks: tuple[Block, ...]
    matrices: Mapping[str, MatrixRef]
    shapes: Mapping[str, tuple[int, int]]
    head: str | None
    tied: bool
    embeddings: Mapping[str, MatrixRef] = field(default_factory=dict)
    embedding_shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    untouched: tuple[str, ...] = ()
    stacks: tuple[str, ...] = ()
    returns: tuple[bool, ...] | None = None
    experts: Mapping[str, int] = field(default_factory=dict)
    stored: Mapping[str, MatrixRef] = field(default_factory=dict)
    find_couplings: Callable[["Topology"], tuple[Coupling, ...]] = field(
        default=lambda _: (), repr=False, compare=False
    )
    find_needs: Callable[["Topology"], bool] = field(
        default=lambda _: False, repr=False, compare=False
    )

    @cached_property
    def couplings(self) -> tuple[Coupling, ...]:
        """What can be removed whole: channels, key-value groups, layers; looked for when first asked."""
        return self.find_couplings(self)

    @cached_property
    def needs_weights(self) -> bool:
        """Whether transformers cannot load the linears from packed codes; looked for when first asked."""
        return self.find_needs(self)

    def block_names(self) -> list[str]:
        """Module names of the blocks, in their order."""
        return [block.name for block in self.blocks]

    def block_output(self, hidden: T) -> T | tuple[T | None, ...]:
        """What a block returns that gives these hidden states: alone, or with others of the same shape."""
        if self.returns is None:
            return hidden
        return hidden, *(hidden if is_tensor else None for is_tensor in self.returns)

    def groups(self) -> tuple[LinearGroup, ...]:
        """Every group of linears that is decided on, in the order they run."""
        return tuple(group for block in self.blocks for group in block.decisions)

    def linears(self) -> Iterator[str]:
        """Full names of every linear of the decoder blocks, in the order they run."""
        for block in self.blocks:
            yield from block.linears()

    @property
    def embedding(self) -> str:
        """The input embedding's module name; where it is tied, the one that its weight goes by."""
        names = list(self.embeddings)
        return next((name for name in names if name != self.head), names[0] if names else "")

    @property
    def left_alone(self) -> list[str]:
        """Linears that no plan names: those that are left as they are, and a head that is tied."""
        head = [] if self.head is None or self.head in self.embeddings else [self.head]
        return [*self.untouched, *head]

    def matrix(self, name: str) -> MatrixRef:
        """Where the weight of a linear, an embedding or a head lies."""
        return self.matrices[name] if name in self.matrices else self.embeddings[name]

    def shape(self, name: str) -> tuple[int, int]:
        """(rows, columns) of the weight of a linear, an embedding or a head."""
        return self.shapes[name] if name in self.shapes else self.embedding_shapes[name]

    def parameters(self) -> dict[str, str]:
        """The linear that each of their parameters belongs to, by the parameter's name."""
        return {ref.parameter: name for name, ref in self.matrices.items()}

    def group_size(self, group: LinearGroup) -> int:
        """Weights of a group."""
        return sum(rows * cols for rows, cols in (self.shapes[name] for name in group.names))

    def routed(self, name: str) -> bool:
        """Whether a linear is an expert's, which is given some tokens only."""
        return experts_module(name) in self.experts

    @cached_property
    def common_widths(self) -> Mapping[str, tuple[int, ...]]:
        """The widths of all linears that engines want stored as a linear is, by its name, where the model has
        experts: those of all experts, which are stacked, or of all others."""
        if not self.experts:
            return {}
        widths: dict[bool, set[int]] = {True: set(), False: set()}
        for name in self.linears():
            widths[self.routed(name)].add(self.shapes[name][1])
        sets = {routed: tuple(sorted(each)) for routed, each in widths.items()}
        return {name: sets[self.routed(name)] for name in self.linears()}

    def as_stored(self) -> "Topology":
        """The same under the names, and in the stacks, that a checkpoint on the hub has tensors in."""
        if not self.stored:
            return self

        def stored(ref: MatrixRef) -> MatrixRef:
            place = self.stored[ref.parameter]
            return place if place.index is not None else replace(ref, parameter=place.parameter)

        return replace(
            self,
            matrices={name: stored(ref) for name, ref in self.matrices.items()},
            embeddings={name: stored(ref) for name, ref in self.embeddings.items()},
            untouched=tuple(self.stored[f"{name}.weight"].module for name in self.untouched),
            stored={},
        )

    def transposed(self) -> list[str]:
        """Linears that are stored transposed (GPT-2's Conv1D)."""
        return [name for name, ref in self.matrices.items() if ref.transposed]
