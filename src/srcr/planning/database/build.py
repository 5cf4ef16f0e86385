"""Fills the level database: one walk over the blocks, one factorisation a group, every level from it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from srcr.engine.block import BlockPair
from srcr.engine.memory import MemoryPolicy
from srcr.engine.walk import walk
from srcr.environment import versions
from srcr.errors import InputError, NumericalError
from srcr.models.blockwise import BlockSource
from srcr.models.topology import LinearGroup, Topology
from srcr.numerics.compressed import CompressedWeight
from srcr.planning.context import SearchContext
from srcr.planning.database.store import LevelDatabase
from srcr.planning.space import SearchSpace
from srcr.plans.plan import LayerPlan
from srcr.plans.specs import CompressionLevel
from srcr.serialize import digest, to_dict
from srcr.solver.problem import Factors, LayerProblem
from srcr.solver.solve import solve

#: ``(block, what)``: a step of the walk begins in block number ``block``.
OnStep = Callable[[int, str], None]


@dataclass(frozen=True, eq=False)
class LevelProblem:
    """What all levels of a group are made from: a ``problem`` without plans, and the ``factors`` of its
    statistics, which they share. Levels are made for the dense model's own inputs, so the statistics have no
    cross moments that a solution would take."""

    problem: LayerProblem
    factors: Factors


#: Makes several levels of a group, in their order, each by the plans of its linears.
SolveLevels = Callable[
    [LevelProblem, Sequence[Mapping[str, LayerPlan]]], Iterable[dict[str, CompressedWeight]]
]


def solve_level(level: LevelProblem, plans: Mapping[str, LayerPlan]) -> dict[str, CompressedWeight]:
    """A level of a group by name, in main memory."""
    weights = solve(replace(level.problem, plans=plans), level.factors)
    return {name: weight.cpu() for name, weight in weights.items()}


def solve_here(
    level: LevelProblem, plans: Sequence[Mapping[str, LayerPlan]]
) -> Iterator[dict[str, CompressedWeight]]:
    """The levels, made in this process when they are asked for."""
    return (solve_level(level, each) for each in plans)


def database_context(space: SearchSpace, context: SearchContext) -> str:
    """A hash of everything that decides an entry of the database besides group and level."""
    return digest(
        {
            "entries": "native",
            "prune": space.prune.method,
            "quant": {k: v for k, v in to_dict(space.quant).items() if k != "num_bits"},
            "group_sizes": [space.group_sizes, sorted(space.super_blocks.items())],
            "solver": to_dict(space.draft()),
            "model": context.opened.sha256,
            "calibration": context.splits.calibration.sha256,
            "device": context.device,
            "precision": str(context.blocks.running),
            "versions": versions(),
        }
    )


def database_bytes(topology: Topology, space: SearchSpace) -> int:
    """About how many bytes the database of a space's groups at all levels takes: codes or values, a mask
    where there are zeros, and a scale a row."""
    groups = space.groups(topology)
    size = sum(topology.group_size(group) for group in groups)
    rows = sum(topology.shapes[name][0] for group in groups for name in group.names)
    return sum(
        size * level.num_bits // 8 + (size // 8 if level.sparsity > 0 else 0) + 4 * rows
        for level in space.levels
        if _compresses(level)
    )


def check_database_size(needed: int, limit: int | None, free: int) -> None:
    """Refuse a database that is larger than the user's limit, or than the disk has room for.

    Raises:
        InputError: with what is needed, and what to do.
    """
    remedy = "use fewer --sparsities or --widths"
    if limit is not None and needed > limit:
        raise InputError(
            f"the level database takes about {needed / 1e6:.1f} MB, the limit is {limit / 1e6:.1f} MB: "
            f"{remedy}, or a higher --database-limit"
        )
    if needed > free:
        raise InputError(
            f"the level database takes about {needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free on its "
            f"disk: {remedy}, or put it elsewhere with --database"
        )


@dataclass(frozen=True, eq=False)
class DatabaseBuilder:
    """Makes what a database lacks of a space: each level of each group on its own, given the dense model's
    inputs. (Given those of a compressed model, each level would make up for what is lost before it; such
    levels cannot be swapped one by one, docs/decisions/007.) ``solve_levels`` makes several at once."""

    database: LevelDatabase
    space: SearchSpace
    topology: Topology
    dtype: torch.dtype
    on_step: OnStep
    solve_levels: SolveLevels = solve_here

    def missing(self, group: LinearGroup) -> list[CompressionLevel]:
        """The levels of a group that are not there yet."""
        levels = [level for level in self.space.levels if _compresses(level)]
        return [level for level in levels if self.database.find(group, level) is None]

    @torch.no_grad()
    def build(self, source: BlockSource, batches: Sequence[Tensor], policy: MemoryPolicy) -> None:
        """Walk over the blocks with token ids [n, len] of each batch, as far as levels are missing.

        Raises:
            NumericalError: activations overflow, or a Hessian cannot be factorised.
        """
        groups = self.space.groups(self.topology)
        left = {part for group in groups for part in group.inputs() if self.missing(part)}

        def visit(pair: BlockPair) -> None:
            for group in pair.groups:
                if group in left:
                    self._fill(pair, group)
                    left.discard(group)
                self.on_step(pair.index, group.names[0])

        if left:
            forward = lambda index: self.on_step(index, "forward")  # noqa: E731
            for _ in walk(source, batches, visit, forward, dense_batches=0, policy=policy):
                if not left:
                    break

    def _fill(self, pair: BlockPair, group: LinearGroup) -> None:
        """Make and store the missing levels of a group."""
        levels = self.missing(group)
        plans = [self.space.group_plans(group, level, self.topology.shapes) for level in levels]
        weights = {name: pair.weight(name) for name in group.names}
        solver = self.space.solver
        statistics = pair.statistics(group, False, solver.expert_prior, bool(solver.expert_gates))
        problem = LayerProblem(weights, {}, statistics, self.space.draft(), self.dtype)
        level = LevelProblem(problem, {})
        with _named(group.names[0]):
            self.database.put(
                group, levels[0], solve_level(level, plans[0])
            )  # and the factor is known
            others = self.solve_levels(level, plans[1:])
            for other, weights_of_level in zip(levels[1:], others, strict=True):
                self.database.put(group, other, weights_of_level)


def _compresses(level: CompressionLevel) -> bool:
    """Whether a level changes anything."""
    return level.num_bits < 16 or level.sparsity > 0


@contextmanager
def _named(layer: str) -> Iterator[None]:
    """Put the layer's name in front of a numerical error."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(f"{layer}: {error}") from error
