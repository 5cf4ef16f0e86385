"""A plan made explicit, and checked against the shapes of a model, before any work is done."""

from collections.abc import Mapping
from dataclasses import replace

from srcr.errors import InputError
from srcr.numerics.masks import parse_structure
from srcr.plans.plan import CompressionPlan, LayerPlan, Recipe

#: Group size taken where it divides a width and none was asked for.
AUTO_GROUP = 128

#: (out_features, in_features) of each linear layer by name.
Shapes = Mapping[str, tuple[int, int]]


def uniform_plan(shapes: Shapes, recipe: Recipe) -> CompressionPlan:
    """The recipe, layer by layer."""
    layers = tuple(LayerPlan(name, recipe.prune, recipe.quant) for name in shapes)
    return CompressionPlan(layers, solver=recipe.solver)


def resolve_group_sizes(
    plan: CompressionPlan, shapes: Shapes
) -> tuple[CompressionPlan, str | None]:
    """The plan with every "auto" group size made explicit (128 where it divides the width, else -1),
    and a note that says how many became which."""
    layers = []
    sizes = []
    for layer in plan.layers:
        if layer.quant is not None and layer.quant.group_size == "auto":
            width = shapes[layer.name][1]
            sizes.append(AUTO_GROUP if width % AUTO_GROUP == 0 else -1)
            layers.append(replace(layer, quant=replace(layer.quant, group_size=sizes[-1])))
        else:
            layers.append(layer)
    if not sizes:
        return plan, None
    note = (
        f"group size auto: {AUTO_GROUP} for {sizes.count(AUTO_GROUP)} of {len(sizes)} layers, channel-wise "
        f"for the {sizes.count(-1)} whose width it does not divide"
    )
    return replace(plan, layers=tuple(layers)), note


def check_plan(plan: CompressionPlan, shapes: Shapes) -> None:
    """Refuse a plan that does not fit the model.

    Raises:
        InputError: unknown or repeated layers, widths that a group size or an N:M pattern does not divide.
    """
    names = [layer.name for layer in plan.layers]
    unknown = [name for name in names if name not in shapes]
    if unknown:
        raise InputError(
            f"the plan names {unknown[0]!r}, which is no linear layer of the model's blocks (they are "
            f"called like {next(iter(shapes))!r})"
        )
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"the plan names {twice!r} twice")
    for layer in plan.layers:
        _check_layer(layer, shapes[layer.name][1])


def _check_layer(layer: LayerPlan, width: int) -> None:
    if layer.quant is not None:
        size = layer.quant.group_size
        if isinstance(size, int) and size != -1 and width % size:
            raise InputError(
                f"group size {size} does not divide the width {width} of {layer.name}: use a "
                "divisor, -1 (channel-wise) or auto"
            )
    if layer.prune is not None:
        pattern = parse_structure(layer.prune.mask_structure)
        if pattern and width % pattern[1]:
            raise InputError(
                f"{layer.prune.mask_structure} sparsity needs widths that {pattern[1]} divides; "
                f"{layer.name} has {width}: use another pattern or unstructured"
            )
