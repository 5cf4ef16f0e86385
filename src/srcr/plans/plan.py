"""What happens to each layer of a model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import AliasChoices, Field

from srcr.errors import InputError
from srcr.plans.specs import Override, PruneSpec, QuantSpec, SolverSpec
from srcr.plans.structures import StructureSpec
from srcr.serialize import STRICT, digest, from_dict, read_yaml


@dataclass(frozen=True)
class LayerPlan:
    """What happens to a linear layer; None leaves that half alone."""

    __pydantic_config__ = STRICT

    name: str
    prune: PruneSpec | None = None
    quant: QuantSpec | None = None

    @property
    def bits(self) -> int:
        """Bits of a kept weight: 16 when not quantized."""
        return self.quant.num_bits if self.quant else 16

    @property
    def sparsity(self) -> float:
        """Planned fraction of zeros."""
        return self.prune.sparsity if self.prune else 0.0


@dataclass(frozen=True)
class Target:
    """A size to reach: exactly one of the three, ``tcr`` in [0, 1)."""

    __pydantic_config__ = STRICT

    tcr: float | None = None
    stored_bytes: int | None = None
    loaded_bytes: int | None = None

    def __post_init__(self) -> None:
        sizes = (self.tcr, self.stored_bytes, self.loaded_bytes)
        if sum(size is not None for size in sizes) != 1:
            raise InputError("a target is exactly one of tcr, stored_bytes and loaded_bytes")
        if self.tcr is not None and not 0 <= self.tcr < 1:
            raise InputError(f"target tcr={self.tcr:g}: a rate is from 0 up to but not including 1")


@dataclass(frozen=True)
class CompressionPlan:
    """The plan of a whole model, one entry for each linear layer of its decoder blocks; ``embeddings``: those
    of the input embedding and the output head that are quantized (one where they are tied), by name;
    ``structures``: what is removed whole before, so that layers are named as they are called afterwards."""

    __pydantic_config__ = STRICT

    layers: tuple[LayerPlan, ...]
    target: Target | None = None
    seed: int = 0
    #: Called "sweep" in files of earlier versions.
    solver: Annotated[SolverSpec, Field(validation_alias=AliasChoices("solver", "sweep"))] = field(
        default_factory=SolverSpec
    )
    embeddings: tuple[LayerPlan, ...] | None = None
    structures: StructureSpec | None = None

    def fingerprint(self) -> str:
        """A hash of everything that decides the result."""
        return digest(self)[:16]

    def by_name(self) -> dict[str, LayerPlan]:
        """The plan of each layer by its module name."""
        return {layer.name: layer for layer in self.layers}


@dataclass(frozen=True)
class Recipe:
    """The same treatment for every layer, as the command line names it, and what is different for some.

    ``targets`` and ``ignore`` are patterns of module names (globs, or ``re:`` and a regular expression): only
    what matches one of ``targets`` is compressed (all, where there are none), and nothing that matches one
    of ``ignore``. ``overrides`` says by pattern what some layers get instead; where several match, the later
    ones win. ``embeddings``: how the input embedding and the output head are quantized, whatever
    ``targets`` says. ``structures``: what is removed whole before all that.

    >>> Recipe(PruneSpec(sparsity=0.25), QuantSpec(num_bits=4), ignore=("*.down_proj",)).solver.mode
    'joint'
    """

    __pydantic_config__ = STRICT

    prune: PruneSpec | None = None
    quant: QuantSpec | None = None
    solver: SolverSpec = field(default_factory=SolverSpec)
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    overrides: Mapping[str, Override] = field(default_factory=dict)
    embeddings: QuantSpec | None = None
    structures: StructureSpec | None = None


def read_plan(path: Path) -> CompressionPlan | Recipe:
    """The plan in a YAML file: explicit, with ``layers``, or a recipe.

    Raises:
        InputError: the file cannot be read, or holds neither.
    """
    data = read_yaml(path)
    if isinstance(data, dict) and data and not {"layers", "seed", "target"} & data.keys():
        return from_dict(Recipe, data, str(path))
    return from_dict(CompressionPlan, data, str(path))
