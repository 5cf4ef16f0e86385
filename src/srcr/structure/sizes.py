"""How many elements of which couplings go, checked before any work is done."""

from dataclasses import dataclass

from srcr.errors import InputError
from srcr.models.checkpoint import OpenModel
from srcr.models.topology import Coupling, Kind
from srcr.plans.structures import CHANNEL_MULTIPLE, NAMES, StructureSpec
from srcr.transforms.smaller import Removal, narrower, shallower


@dataclass(frozen=True)
class StructureSize:
    """``size`` elements of a kind in every layer (of layers: in all), of which ``count`` go."""

    kind: Kind
    size: int
    count: int

    @property
    def left(self) -> int:
        """How many stay."""
        return self.size - self.count

    def __str__(self) -> str:
        return f"{self.left} of {self.size} {NAMES[self.kind]}"


def structure_sizes(
    opened: OpenModel, spec: StructureSpec, group_size: int | None = None
) -> tuple[StructureSize, ...]:
    """How many of what go, layers first. ``group_size``: that of the quantization of what is left (None:
    none is named), which channels come in multiples of.

    Raises:
        InputError: nothing would go, or nothing be left; the model has no such structures, not the same in
            every layer, or its config cannot say what is left.
    """
    sizes = []
    for kind in ("layers", "heads", "channels"):
        if kind in spec.amounts():
            size = _size(opened, kind)
            multiple = _multiple(size, group_size) if kind == "channels" else 1
            sizes.append(StructureSize(kind, size, spec.count(kind, size, multiple)))
    return tuple(sizes)


def resolved(sizes: tuple[StructureSize, ...]) -> StructureSpec:
    """The spec of exact counts."""
    return StructureSpec(**{size.kind: size.count for size in sizes})


def coupled(opened: OpenModel, kind: Kind) -> list[Coupling]:
    """The couplings of a kind, one of each block, in their order."""
    return [coupling for coupling in opened.topology.couplings if coupling.kind == kind]


def planned_smaller(opened: OpenModel, sizes: tuple[StructureSize, ...]) -> OpenModel:
    """A model of the shapes that will be left: which elements go is not known yet, the last stand for them.

    Raises:
        InputError: the config cannot say what is left.
    """
    for size in (each for each in sizes if each.kind == "layers"):
        opened = opened.transformed(shallower(opened, range(size.left, size.size)))
    removals = [
        Removal(coupling, tuple(range(size.left, size.size)))
        for size in sizes
        if size.kind != "layers"
        for coupling in coupled(opened, size.kind)
    ]
    if not removals:
        return opened
    try:
        return opened.transformed(narrower(opened, removals))
    except InputError as error:
        raise InputError(_refusal(opened, sizes, error)) from None


def _size(opened: OpenModel, kind: Kind) -> int:
    """Elements of a kind in every layer; of layers, how many there are."""
    blocks = opened.topology.block_names()
    if kind == "layers":
        return len(blocks)
    couplings = coupled(opened, kind)
    if [coupling.block for coupling in couplings] != blocks:
        without = next((b for b in blocks if b not in {c.block for c in couplings}), blocks[0])
        raise InputError(
            f"srcr sees no {NAMES[kind]} of {opened.architecture} that can be removed "
            f"({without} has none of its own): leave {kind} out"
        )
    sizes = {coupling.size for coupling in couplings}
    if len(sizes) > 1:
        raise InputError(
            f"the layers of {opened.architecture} have different numbers of {NAMES[kind]} "
            f"({', '.join(map(str, sorted(sizes)))}): leave {kind} out"
        )
    return sizes.pop()


def _multiple(size: int, group_size: int | None) -> int:
    """What numbers of channels are multiples of: the group size; else the largest power of two up to
    :data:`CHANNEL_MULTIPLE` that ``size`` is a multiple of."""
    if group_size is not None and group_size > 0 and size % group_size == 0:
        return group_size
    multiple = CHANNEL_MULTIPLE
    while size % multiple:
        multiple //= 2
    return multiple


def _refusal(opened: OpenModel, sizes: tuple[StructureSize, ...], error: InputError) -> str:
    """What a config cannot say, with the nearest numbers of heads that it can."""
    what = ", ".join(str(size) for size in sizes if size.kind != "layers")
    heads = next((size for size in sizes if size.kind == "heads"), None)
    remedy = "leave heads and channels out" if heads is None else "leave heads out"
    if heads is not None:
        working = [n for n in range(1, heads.size) if n != heads.count and _builds(opened, n)]
        if working:
            nearest = sorted(working, key=lambda n: abs(n - heads.count))[:3]
            remedy = f"use heads={' or '.join(map(str, sorted(nearest)))}"
    return f"the config of {opened.architecture} cannot say {what} ({error}): {remedy}"


def _builds(opened: OpenModel, count: int) -> bool:
    """Whether the config can say that so many key-value heads are gone."""
    removals = [Removal(c, tuple(range(count))) for c in coupled(opened, "heads")]
    try:
        opened.transformed(narrower(opened, removals))
    except InputError:
        return False
    return True
