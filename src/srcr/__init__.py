"""srcr makes causal language models much smaller and proves how much of their meaning is left.

>>> import srcr
>>> srcr.compress("bundled", "small", sparsity=0.25, bits=4)
>>> srcr.evaluate("bundled", ["small"])
>>> model = srcr.load("small")
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from srcr.data.specs import Calibration, EvaluationText, RecoveryText
    from srcr.data.tokens import Tokens
    from srcr.errors import InputError, NumericalError, SrcrError, VerificationError
    from srcr.formats import load
    from srcr.metrics.specs import SemanticSpec
    from srcr.metrics.speed import SpeedSpec
    from srcr.metrics.tasks import TaskSpec
    from srcr.models.checkpoint import OpenModel, open_model
    from srcr.pipelines.compress import compress
    from srcr.pipelines.evaluate import evaluate
    from srcr.pipelines.export import export
    from srcr.pipelines.inspect import inspect
    from srcr.pipelines.options import Output, RunOptions
    from srcr.pipelines.plan import plan
    from srcr.pipelines.preview import preview_compression, preview_recovery, preview_search
    from srcr.pipelines.push import push
    from srcr.pipelines.recover import recover
    from srcr.pipelines.search import search
    from srcr.pipelines.sensitivity import sensitivity
    from srcr.pipelines.training import Recovery
    from srcr.pipelines.verify import verify
    from srcr.planning.space import SearchSpace
    from srcr.planning.specs import Resources, SearchSpec
    from srcr.plans.objective import Constraint, Objective
    from srcr.plans.plan import CompressionPlan, LayerPlan, Recipe, Target
    from srcr.plans.recovery import RecoverySpec
    from srcr.plans.specs import CompressionLevel, Override, PruneSpec, QuantSpec, SolverSpec
    from srcr.plans.structures import StructureSpec
    from srcr.records.evaluation import Evaluation
    from srcr.records.preview import Preview
    from srcr.records.run import RunRecord
    from srcr.records.search import SearchResult
    from srcr.records.sensitivity import SensitivityTable
    from srcr.report import write_report

__version__ = "0.1.0"

#: Where each public name lives.
_HOMES = {
    "srcr.data.specs": ("Calibration", "EvaluationText", "RecoveryText"),
    "srcr.data.tokens": ("Tokens",),
    "srcr.errors": ("InputError", "NumericalError", "SrcrError", "VerificationError"),
    "srcr.formats": ("load",),
    "srcr.metrics.specs": ("SemanticSpec",),
    "srcr.metrics.speed": ("SpeedSpec",),
    "srcr.metrics.tasks": ("TaskSpec",),
    "srcr.models.checkpoint": ("OpenModel", "open_model"),
    "srcr.pipelines.compress": ("compress",),
    "srcr.pipelines.evaluate": ("evaluate",),
    "srcr.pipelines.export": ("export",),
    "srcr.pipelines.inspect": ("inspect",),
    "srcr.pipelines.options": ("Output", "RunOptions"),
    "srcr.pipelines.plan": ("plan",),
    "srcr.pipelines.preview": ("preview_compression", "preview_recovery", "preview_search"),
    "srcr.pipelines.push": ("push",),
    "srcr.pipelines.recover": ("recover",),
    "srcr.pipelines.search": ("search",),
    "srcr.pipelines.sensitivity": ("sensitivity",),
    "srcr.pipelines.training": ("Recovery",),
    "srcr.pipelines.verify": ("verify",),
    "srcr.plans.objective": ("Constraint", "Objective"),
    "srcr.plans.plan": ("CompressionPlan", "LayerPlan", "Recipe", "Target"),
    "srcr.plans.recovery": ("RecoverySpec",),
    "srcr.plans.specs": ("CompressionLevel", "Override", "PruneSpec", "QuantSpec", "SolverSpec"),
    "srcr.plans.structures": ("StructureSpec",),
    "srcr.records.evaluation": ("Evaluation",),
    "srcr.records.preview": ("Preview",),
    "srcr.records.run": ("RunRecord",),
    "srcr.records.search": ("SearchResult",),
    "srcr.records.sensitivity": ("SensitivityTable",),
    "srcr.report": ("write_report",),
    "srcr.planning.space": ("SearchSpace",),
    "srcr.planning.specs": ("Resources", "SearchSpec"),
}

__all__ = [
    "Calibration",
    "CompressionLevel",
    "CompressionPlan",
    "Constraint",
    "Evaluation",
    "EvaluationText",
    "InputError",
    "LayerPlan",
    "NumericalError",
    "Objective",
    "OpenModel",
    "Output",
    "Override",
    "Preview",
    "PruneSpec",
    "QuantSpec",
    "Recipe",
    "Recovery",
    "RecoverySpec",
    "RecoveryText",
    "Resources",
    "RunOptions",
    "RunRecord",
    "SearchResult",
    "SearchSpace",
    "SearchSpec",
    "SemanticSpec",
    "SensitivityTable",
    "SolverSpec",
    "SpeedSpec",
    "SrcrError",
    "StructureSpec",
    "Target",
    "TaskSpec",
    "Tokens",
    "VerificationError",
    "__version__",
    "compress",
    "evaluate",
    "export",
    "inspect",
    "load",
    "open_model",
    "plan",
    "preview_compression",
    "preview_recovery",
    "preview_search",
    "push",
    "recover",
    "search",
    "sensitivity",
    "verify",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that ``srcr --help`` does not wait for torch."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'srcr' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Every public name, whether it was imported before or not."""
    return sorted({*globals(), *__all__})
