"""Checkpoints with compressed weights, as small and as quick to make as tests need them."""

import torch

from srcr.formats import Format, get_format, resolve_for
from srcr.formats.checkpoint import Checkpoint, planned_contents
from srcr.models.checkpoint import ModelLike, open_model
from srcr.numerics.compressed import CompressedWeight
from srcr.numerics.hessian import LayerStatistics
from srcr.pipelines.embeddings import round_to_nearest
from srcr.plans.plan import CompressionPlan, Recipe
from srcr.plans.resolve import check_plan, uniform_plan
from srcr.solver.problem import LayerProblem
from srcr.solver.solve import solve


def compressed_checkpoint(
    model: ModelLike, plan: CompressionPlan | Recipe, fmt: Format | None = None
) -> Checkpoint:
    """The model compressed by a plan without any data, as if every input were as likely as any other;
    for a format, with the group sizes and scales that it stores."""
    opened = open_model(model)
    shapes, tables = opened.topology.shapes, opened.topology.embedding_shapes
    plan = uniform_plan(shapes, plan, tables) if isinstance(plan, Recipe) else plan
    check_plan(plan, shapes, tables)
    plan, _ = resolve_for(fmt or get_format("dense"), plan, opened)
    weights: dict[str, CompressedWeight] = {}
    for layer in plan.layers:
        weight = opened.blockwise.matrix(layer.name).to(torch.float32)
        statistics = LayerStatistics(torch.eye(weight.shape[1]))
        weights |= solve(
            LayerProblem(
                {layer.name: weight}, {layer.name: layer}, statistics, plan.solver, opened.dtype
            )
        )
    for layer in plan.embeddings or ():
        assert layer.quant is not None
        table, cpu = opened.blockwise.matrix(layer.name), torch.device("cpu")
        weights[layer.name] = round_to_nearest(table, layer.quant, opened.dtype, cpu)
    return Checkpoint.of(opened, planned_contents(plan, opened), weights.__getitem__)
