"""Levels: how strongly a decision unit is compressed, and the ones that a search may choose from."""

from collections.abc import Sequence
from dataclasses import dataclass

from srcr.errors import InputError
from srcr.models.topology import Topology
from srcr.numerics import masks
from srcr.types import LayerPlan, PruneSpec, QuantSpec

#: Sparsities and widths of the default levels.
SPARSITIES = (0.0, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5)
BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True, order=True)
class Level:
    """A share of zeros and a width; (0, 16) leaves a layer as it is."""

    sparsity: float
    num_bits: int

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1 or not (2 <= self.num_bits <= 8 or self.num_bits == 16):
            raise InputError(
                f"level {self}: sparsity is 0 up to but not including 1, bits are 2 to 8, or 16 for none"
            )

    def __str__(self) -> str:
        return f"{100 * self.sparsity:g}%+{self.num_bits}"

    def cost(self, size: int) -> int:
        """Theoretical bits of ``size`` weights: what is not pruned, times the width."""
        return (size - masks.count_pruned(self.sparsity, size)) * self.num_bits


@dataclass(frozen=True)
class Treatment:
    """What all levels of one search share: methods and grid. Their sparsity and width count for nothing."""

    prune: PruneSpec = PruneSpec()  # noqa: RUF009 - frozen
    quant: QuantSpec = QuantSpec()  # noqa: RUF009 - frozen

    def layer(self, name: str, level: Level) -> LayerPlan:
        """The plan of one linear at a level."""
        prune = quant = None
        if level.sparsity > 0:
            prune = PruneSpec(self.prune.method, level.sparsity)
        if level.num_bits < 16:
            old = self.quant
            quant = QuantSpec(
                old.method, level.num_bits, old.group_size, old.symmetric, old.actorder
            )
        return LayerPlan(name, prune, quant)


@dataclass(frozen=True)
class Decision:
    """Linears that are decided on together, because they share an input and engines fuse them: full names."""

    names: tuple[str, ...]

    @property
    def label(self) -> str:
        """A short name: the block, and the linears within it."""
        first, _, _ = self.names[0].rpartition(".")
        return f"{first}.{'/'.join(name.rpartition('.')[2] for name in self.names)}"


def decisions(topology: Topology) -> tuple[Decision, ...]:
    """Every decision unit of a model, in the order they run."""
    return tuple(
        Decision(tuple(f"{block.name}.{name}" for name in unit.names))
        for block in topology.blocks
        for unit in block.units
    )


def size_of(decision: Decision, topology: Topology) -> int:
    """Weights of a decision unit."""
    return sum(rows * cols for rows, cols in (topology.shapes[name] for name in decision.names))


def grid(sparsities: Sequence[float] = SPARSITIES, bits: Sequence[int] = BITS) -> tuple[Level, ...]:
    """Every combination, cheapest first.

    Raises:
        InputError: a value out of range, or none at all.
    """
    found = {Level(s, q) for s in sparsities for q in bits}
    if not found:
        raise InputError(
            "no levels to choose from: name at least one of --sparsities and of --widths"
        )
    return tuple(sorted(found, key=lambda level: ((1 - level.sparsity) * level.num_bits, level)))
