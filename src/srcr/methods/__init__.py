"""Compression methods, one file each, looked up by name.

To add one, drop a file into this folder (or another that is in ``srcr.methods.__path__``) that defines
``METHOD``: a :class:`Pruner` (what a weight's removal costs) or a :class:`Quantizer` (which grid a weight is
rounded on). The solver combines a pruner with a quantizer; nothing else needs to know.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from srcr.environment import definitions
from srcr.errors import InputError, nearest
from srcr.plans.plan import CompressionPlan, Recipe
from srcr.plans.specs import PruneSpec, QuantSpec

if TYPE_CHECKING:  # a list of methods does not wait for torch
    from torch import Tensor

    from srcr.numerics.grid import Grid, GridSpec


class Scores(Protocol):
    """What removing each weight costs, lowest goes first."""

    def __call__(
        self, W: "Tensor", diagonal: "Tensor", pivots: "Tensor", rounded: "Tensor | None"
    ) -> "Tensor":
        """Scores [rows, n] of the current weights ``W`` [rows, n], given ``diag(H)`` and the sweep's
        pivots of these columns [n], and what the weights would be rounded to if they were kept
        (None when nothing is rounded)."""
        ...


@dataclass(frozen=True)
class Pruner:
    """``scope``: scores are compared across the whole "layer" or within a "row"; ``compensates``:
    the weights that stay are updated to make up for those that go."""

    name: str
    summary: str
    paper: str
    scores: Scores
    scope: Literal["layer", "row"]
    compensates: bool


#: ``(W [rows, cols], spec, importance [cols], mask [rows, cols] or None) -> Grid`` of the weights under the
#: mask; the importance of a column is its entry of ``diag(H)``.
FitGrid: TypeAlias = "Callable[[Tensor, GridSpec, Tensor, Tensor | None], Grid]"


@dataclass(frozen=True)
class Quantizer:
    """``fit``: the grid for a weight; ``compensates``: weights still to be rounded make up for the
    error of those that were."""

    name: str
    summary: str
    paper: str
    fit: FitGrid
    compensates: bool


@cache
def _discover(path: tuple[str, ...]) -> tuple[dict[str, Pruner], dict[str, Quantizer]]:
    """The methods of every file in the folders of ``path``."""
    methods = definitions(__name__, path, "METHOD")
    return (
        {method.name: method for method in methods if isinstance(method, Pruner)},
        {method.name: method for method in methods if isinstance(method, Quantizer)},
    )


def pruners() -> dict[str, Pruner]:
    """Every pruner by name."""
    return _discover(tuple(__path__))[0]


def quantizers() -> dict[str, Quantizer]:
    """Every quantizer by name."""
    return _discover(tuple(__path__))[1]


def get_pruner(name: str) -> Pruner:
    """The pruner called ``name``.

    Raises:
        InputError: lists the names there are.
    """
    if name not in pruners():
        raise InputError(f"prune method {name!r} is not known: {nearest(name, pruners())}")
    return pruners()[name]


def get_quantizer(name: str) -> Quantizer:
    """The quantizer called ``name``.

    Raises:
        InputError: lists the names there are.
    """
    if name not in quantizers():
        raise InputError(f"quant method {name!r} is not known: {nearest(name, quantizers())}")
    return quantizers()[name]


def check_methods(plan: CompressionPlan | Recipe) -> None:
    """Refuse a plan with a method that does not exist.

    Raises:
        InputError: lists the names there are.
    """
    specs: list[PruneSpec | QuantSpec | None]
    if isinstance(plan, Recipe):
        specs = [plan.prune, plan.quant, plan.embeddings]
        for override in plan.overrides.values():
            specs += override.applied(plan.prune, plan.quant)
    else:
        layers = (*plan.layers, *(plan.embeddings or ()))
        specs = [spec for layer in layers for spec in (layer.prune, layer.quant)]
    for spec in specs:
        if isinstance(spec, PruneSpec):
            get_pruner(spec.method)
        elif spec is not None:
            get_quantizer(spec.method)
