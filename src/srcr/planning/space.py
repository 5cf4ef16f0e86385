"""What a plan chooses from: compression levels, and how each is made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from srcr.errors import InputError
from srcr.models.topology import LinearGroup, Topology
from srcr.planning.specs import BITS, SPARSITIES
from srcr.plans.patterns import check_patterns, matches_any
from srcr.plans.plan import CompressionPlan, LayerPlan
from srcr.plans.resolve import (
    AUTO_GROUPS,
    Shapes,
    is_left_alone,
    resolve_group_sizes,
    resolve_scale_bits,
)
from srcr.plans.specs import CompressionLevel, PruneSpec, QuantSpec, SolverSpec
from srcr.records.search import Measurement

#: A level for every group of linears, in the order they run; None leaves the group as it is.
Assignment = tuple[CompressionLevel | None, ...]


def level_grid(
    sparsities: Sequence[float] = SPARSITIES, bits: Sequence[int] = BITS
) -> tuple[CompressionLevel, ...]:
    """Every combination, cheapest first.

    Raises:
        InputError: a value out of range, or none at all.
    """
    levels = {CompressionLevel(s, q) for s in sparsities for q in bits}
    if not levels:
        raise InputError(
            "no levels to choose from: name at least one of --sparsities and of --widths"
        )
    return tuple(sorted(levels, key=_by_cost))


def spread_levels(levels: Sequence[CompressionLevel], n: int) -> list[CompressionLevel]:
    """``n`` of the levels, spread evenly over what they cost, the outermost among them.

    Raises:
        InputError: a negative number.
    """
    if n < 0:
        raise InputError(
            f"probes {n} must not be negative: it is how many levels of each group are measured"
        )
    ordered = sorted(levels, key=_by_cost)
    if n >= len(ordered):
        return ordered
    if n <= 1:
        return ordered[len(ordered) // 2 : len(ordered) // 2 + n]
    return [ordered[round(i * (len(ordered) - 1) / (n - 1))] for i in range(n)]


def _by_cost(level: CompressionLevel) -> tuple[float, CompressionLevel]:
    return (1 - level.sparsity) * level.num_bits, level


@dataclass(frozen=True)
class SearchSpace:
    """``levels`` to choose from; ``prune``, ``quant`` and ``solver``: how each is made (their sparsity and
    width count for nothing); ``group_sizes`` and ``super_blocks`` stand for the group size "auto", as formats
    have them (:class:`srcr.formats.Format`), ``common_widths`` for the widths that one size divides.
    ``draft_rounds``: how often a level of the database is polished at most. Levels are compared with each
    other, which one round is enough for; what comes of the comparison is compressed again. ``targets`` and
    ``ignore``: patterns of the linears that get a level, and of those that stay as they are; ``embeddings``:
    how the input embedding and the output head are rounded in every plan (None: not at all).

    >>> SearchSpace(level_grid([0.0, 0.25], [3, 4])).levels[0]
    CompressionLevel(sparsity=0.25, num_bits=3)
    """

    levels: tuple[CompressionLevel, ...] = field(default_factory=level_grid)
    prune: PruneSpec = field(default_factory=PruneSpec)
    quant: QuantSpec = field(default_factory=QuantSpec)
    solver: SolverSpec = field(default_factory=SolverSpec)
    draft_rounds: int = 1
    group_sizes: tuple[int, ...] = AUTO_GROUPS
    super_blocks: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    common_widths: Mapping[str, tuple[int, ...]] | None = None
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    embeddings: QuantSpec | None = None

    def groups(self, topology: Topology) -> tuple[LinearGroup, ...]:
        """The groups of linears that get a level, in the order they run.

        Raises:
            InputError: a pattern matches nothing, or a part of a group; no group is left.
        """
        groups = topology.groups()
        if not self.targets and not self.ignore:
            return groups
        check_patterns("targets", self.targets, topology.shapes)
        others = [*topology.embeddings, *topology.left_alone]
        check_patterns("ignore", self.ignore, [*topology.shapes, *others])
        chosen = []
        for group in groups:
            alone = {is_left_alone(name, self.targets, self.ignore) for name in group.names}
            if len(alone) > 1:
                names = ", ".join(group.names)
                raise InputError(
                    f"patterns choose a part of {names}: they share an input and get one level, so name all "
                    "of them or none"
                )
            if alone == {False}:
                chosen.append(group)
        if not chosen:
            raise InputError("targets and ignore leave nothing to compress: name fewer to ignore")
        return tuple(chosen)

    def embedding_plans(self, topology: Topology) -> tuple[LayerPlan, ...]:
        """The plans of the input embedding and the output head, their group sizes made explicit."""
        if self.embeddings is None:
            return ()
        shapes = topology.embedding_shapes
        layers = tuple(
            LayerPlan(name, None, self.embeddings)
            for name in topology.embeddings
            if not matches_any(name, self.ignore)
        )
        plan = CompressionPlan((), embeddings=layers)
        plan = resolve_scale_bits(plan, {}, shapes, self.super_blocks)
        plan, _ = resolve_group_sizes(plan, {}, shapes, self.group_sizes)
        return plan.embeddings or ()

    def draft(self) -> SolverSpec:
        """How a level of the database is solved."""
        rounds = min(self.draft_rounds, self.solver.descent_rounds)
        return replace(self.solver, descent_rounds=rounds)

    def layer(self, name: str, level: CompressionLevel, shapes: Shapes) -> LayerPlan:
        """The plan of a linear at a level, its group size made explicit."""
        prune = quant = None
        if level.sparsity > 0:
            prune = PruneSpec(self.prune.method, level.sparsity)
        if level.num_bits < 16:
            quant = replace(self.quant, num_bits=level.num_bits)
        plan, shapes = CompressionPlan((LayerPlan(name, prune, quant),)), {name: shapes[name]}
        plan = resolve_scale_bits(plan, shapes, choices=self.super_blocks)
        plan, _ = resolve_group_sizes(
            plan, shapes, choices=self.group_sizes, common_widths=self.common_widths or {}
        )
        return plan.layers[0]

    def plan(
        self, levels: Mapping[str, CompressionLevel], topology: Topology, seed: int
    ) -> CompressionPlan:
        """The plan that gives each linear its level, by name; those without one stay as they are."""
        shapes = topology.shapes
        layers = tuple(
            self.layer(name, levels[name], shapes) if name in levels else LayerPlan(name)
            for name in shapes
        )
        embeddings = self.embedding_plans(topology) or None
        return CompressionPlan(layers, None, seed, self.solver, embeddings=embeddings)

    def group_plans(
        self, group: LinearGroup, level: CompressionLevel, shapes: Shapes
    ) -> dict[str, LayerPlan]:
        """The plans of a group's linears at a level, by name."""
        return {name: self.layer(name, level, shapes) for name in group.names}


def levels_by_name(
    groups: Sequence[LinearGroup], assignment: Assignment
) -> dict[str, CompressionLevel]:
    """The level of each linear that an assignment compresses."""
    return {
        name: level
        for group, level in zip(groups, assignment, strict=True)
        for name in group.names
        if level is not None
    }


def measurement(assignment: Assignment, kl: float, complete: bool = True) -> Measurement:
    """The record of a measured assignment."""
    levels = tuple(None if level is None else str(level) for level in assignment)
    return Measurement(kl, complete, levels)
