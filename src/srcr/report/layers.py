"""The layers of a run by type: query, key, value, output, gate, up and down projections beside each other."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from srcr.records.run import LayerRecord
from srcr.report.plots import Figure, axis
from srcr.report.runs import Run


@dataclass(frozen=True)
class TypeSummary:
    """The layers that are called the same in every block: how many, their weights, and by weights the means
    of sparsity, bits and error; the one with the largest error."""

    name: str
    count: int
    weights: int
    sparsity: float
    bits: float
    error: float
    worst: LayerRecord


def layer_type(name: str) -> str:
    """What a layer is called within its block: the last part of its name."""
    return name.rpartition(".")[2]


def block_number(name: str) -> int | None:
    """The block that a layer is in: the first number among the parts of its name."""
    parts = re.findall(r"(?:^|\.)(\d{1,6})(?=\.|$)", name)
    return int(parts[0]) if parts else None


def by_type(layers: Sequence[LayerRecord]) -> list[TypeSummary]:
    """A summary of each type, in the order they run."""
    types: dict[str, list[LayerRecord]] = {}
    for layer in layers:
        types.setdefault(layer_type(layer.name), []).append(layer)
    return [_summary(name, members) for name, members in types.items()]


def _summary(name: str, members: Sequence[LayerRecord]) -> TypeSummary:
    sizes = [layer.shape[0] * layer.shape[1] for layer in members]
    weights = sum(sizes)

    def mean(values: Sequence[float]) -> float:
        pairs = zip(sizes, values, strict=True)
        return sum(size * value for size, value in pairs) / max(1, weights)

    return TypeSummary(
        name,
        len(members),
        weights,
        mean([layer.sparsity for layer in members]),
        mean([layer.bits for layer in members]),
        mean([layer.error for layer in members]),
        max(members, key=lambda layer: layer.error if math.isfinite(layer.error) else math.inf),
    )


def layer_layout() -> dict[str, Any]:
    """Three panels over the number of the block: error, bits, sparsity; the page fills them."""
    return {
        "xaxis": axis("block", anchor="y3"),
        "yaxis": axis("error", log=True, domain=[0.56, 1.0]),
        "yaxis2": axis("bits", domain=[0.29, 0.49], rangemode="tozero", nticks=4),
        "yaxis3": axis("sparsity, %", domain=[0.0, 0.22], rangemode="tozero", nticks=4),
    }


def layer_names(run: Run) -> tuple[str, ...]:
    """The names of a run's layers, in the model's order."""
    return tuple(layer.name for layer in run.record.layers) if run.record else ()


def layer_columns(run: Run) -> list[list[float | None]] | None:
    """Error, bits and sparsity in percent of every layer; None if unknown."""
    if run.record is None or not run.record.layers:
        return None
    layers = run.record.layers
    return [
        [float(f"{layer.error:.3g}") if math.isfinite(layer.error) else None for layer in layers],
        [round(layer.bits, 2) for layer in layers],
        [round(100 * layer.sparsity, 2) for layer in layers],
    ]


def layer_data(runs: Sequence[Run], detailed: frozenset[int]) -> Figure:
    """What the page's script draws. Names are kept once: mostly all runs have the same."""
    names = [layer_names(run) for run in runs]
    distinct = list(dict.fromkeys(names))
    return {
        "layout": layer_layout(),
        "names": distinct,
        "types": [[layer_type(name) for name in own] for own in distinct],
        "blocks": [[block_number(name) for name in own] for own in distinct],
        "named": [distinct.index(own) for own in names],
        "columns": [
            layer_columns(run) if index in detailed else None for index, run in enumerate(runs)
        ],
    }
