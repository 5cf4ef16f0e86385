"""How many elements of which couplings go, checked before any work is done."""

from dataclasses import dataclass

from srcr.errors import InputError
from srcr.models.checkpoint import OpenModel
from srcr.models.topology import Coupling, Kind
from srcr.plans.structures import CHANNEL_MULTIPLE, NAMES, StructureSpec
from srcr.transforms.fewer_experts import (
    chosen_experts,
    expert_groups,
    expert_keys,
    fewer_experts,
)
from srcr.transforms.smaller import Removal, narrower, shallower

#: What is removed of every block's couplings.
WIDTHS = ("heads", "channels")


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
    opened: OpenModel, spec: StructureSpec, group_size: int | str | None = None
) -> tuple[StructureSize, ...]:
    """How many of what go, layers first, then experts. ``group_size``: that of the quantization of what is
    left (None or "auto": none is named), which channels come in multiples of.

    Raises:
        InputError: nothing would go, or nothing be left; the model has no such structures, not the same in
            every layer, or its config cannot say what is left.
    """
    sizes = []
    for kind in ("layers", "experts", "heads", "channels"):
        if kind in spec.amounts():
            size = _size(opened, kind)
            multiple = _multiple(size, group_size) if kind == "channels" else 1
            sizes.append(StructureSize(kind, size, spec.count(kind, size, multiple)))
            if kind == "experts":
                _check_experts(opened, sizes[-1])
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
    for size in (each for each in sizes if each.kind == "experts"):
        last = tuple(range(size.left, size.size))
        fewer = fewer_experts(opened, dict.fromkeys(opened.topology.experts, last))
        try:
            opened = opened.transformed(fewer)
        except InputError as error:
            raise InputError(
                f"the config of {opened.architecture} cannot say {size} ({error}): use another number of "
                "experts"
            ) from None
    removals = [
        Removal(coupling, tuple(range(size.left, size.size)))
        for size in sizes
        if size.kind in WIDTHS
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
    if kind == "experts":
        return _experts(opened)
    if kind == "channels" and opened.topology.experts:
        raise InputError(
            f"srcr removes no channels of a mixture of experts such as {opened.architecture}: remove experts"
        )
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


def _experts(opened: OpenModel) -> int:
    """Experts of every layer that has some."""
    counts = set(opened.topology.experts.values())
    if len(counts) == 1:
        return counts.pop()
    if not counts:
        raise InputError(
            f"{opened.architecture} has no experts that could be removed: leave experts out"
        )
    raise InputError(
        f"the layers of {opened.architecture} have different numbers of experts "
        f"({', '.join(map(str, sorted(counts)))}): leave experts out"
    )


def _check_experts(opened: OpenModel, size: StructureSize) -> None:
    """Refuse to leave fewer experts than each token is routed to, or as many as the config cannot say.

    Raises:
        InputError: with what works.
    """
    chosen = chosen_experts(opened)
    if size.left < chosen:
        raise InputError(
            f"{size} would be left, and every token is routed to {chosen}: use experts={size.size - chosen} "
            "or fewer"
        )
    groups = expert_groups(opened)
    if size.count % groups:
        nearest = max(1, round(size.count / groups)) * groups
        raise InputError(
            f"routers of {opened.architecture} choose among {groups} groups of experts first, so that as "
            f"many go from each: use a multiple of {groups}, as experts={nearest}"
        )
    if not expert_keys(opened, size.size):
        raise InputError(
            f"the config of {opened.architecture} does not say how many experts there are in a way that srcr "
            "knows: leave experts out"
        )


def _multiple(size: int, group_size: int | str | None) -> int:
    """What numbers of channels are multiples of: the group size; else the largest power of two up to
    :data:`CHANNEL_MULTIPLE` that ``size`` is a multiple of."""
    if isinstance(group_size, int) and group_size > 0 and size % group_size == 0:
        return group_size
    multiple = CHANNEL_MULTIPLE
    while size % multiple:
        multiple //= 2
    return multiple


def _refusal(opened: OpenModel, sizes: tuple[StructureSize, ...], error: InputError) -> str:
    """What a config cannot say, with the nearest numbers of heads that it can."""
    what = ", ".join(str(size) for size in sizes if size.kind in WIDTHS)
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
