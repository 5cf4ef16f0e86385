"""srcr makes causal language models much smaller and proves how much of their meaning is left.

>>> import srcr
>>> recipe = srcr.Recipe(srcr.PruneSpec(sparsity=0.25), srcr.QuantSpec(num_bits=4))
>>> srcr.compress("bundled", recipe, srcr.Calibration(), srcr.Output(Path("small")))
>>> srcr.evaluate("bundled", ["small"])
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from srcr.compression import Calibration, Output, Recipe, compress
    from srcr.evaluation import EvaluationText, TaskSpec, evaluate, inspect
    from srcr.metrics.semantic import SemanticSpec
    from srcr.models.load import load
    from srcr.planning.building import Space
    from srcr.planning.field import Resources
    from srcr.planning.levels import Level, Treatment
    from srcr.planning.plan import plan
    from srcr.planning.search import SearchSpec, search
    from srcr.planning.sensitivity import sensitivity
    from srcr.report import write_report
    from srcr.types import (
        CompressionPlan,
        LayerPlan,
        PruneSpec,
        QuantSpec,
        RunRecord,
        SweepSpec,
        Target,
    )

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "CompressionPlan",
    "EvaluationText",
    "LayerPlan",
    "Level",
    "Output",
    "PruneSpec",
    "QuantSpec",
    "Recipe",
    "Resources",
    "RunRecord",
    "SearchSpec",
    "SemanticSpec",
    "Space",
    "SweepSpec",
    "Target",
    "TaskSpec",
    "Treatment",
    "compress",
    "evaluate",
    "inspect",
    "load",
    "plan",
    "search",
    "sensitivity",
    "write_report",
]

_HOMES = {
    "srcr.compression": ("Calibration", "Output", "Recipe", "compress"),
    "srcr.evaluation": ("EvaluationText", "TaskSpec", "evaluate", "inspect"),
    "srcr.metrics.semantic": ("SemanticSpec",),
    "srcr.report": ("write_report",),
    "srcr.models.load": ("load",),
    "srcr.planning.building": ("Space",),
    "srcr.planning.field": ("Resources",),
    "srcr.planning.levels": ("Level", "Treatment"),
    "srcr.planning.plan": ("plan",),
    "srcr.planning.search": ("SearchSpec", "search"),
    "srcr.planning.sensitivity": ("sensitivity",),
    "srcr.types": (
        "CompressionPlan", "LayerPlan", "PruneSpec", "QuantSpec", "RunRecord", "SweepSpec", "Target",
    ),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import on first use, so that ``srcr --help`` does not wait for torch."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'srcr' has no attribute {name!r}")
