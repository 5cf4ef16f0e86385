"""What a plan means for a model and a format, before any work is done."""

from dataclasses import replace

from srcr.errors import InputError
from srcr.formats import Format, get_format, resolve_for
from srcr.formats.checkpoint import Contents
from srcr.models.checkpoint import OpenModel
from srcr.plans.plan import CompressionPlan, Recipe
from srcr.plans.resolve import check_plan, uniform_plan
from srcr.plans.specs import ScaleDtype
from srcr.structure.sizes import StructureSize, structure_sizes

#: What is written where no format is named and it can hold the plan; and where it cannot.
DEFAULT_FORMAT, FALLBACK_FORMAT = "compressed-tensors", "dense"


def sizes_of_plan(plan: CompressionPlan | Recipe, opened: OpenModel) -> tuple[StructureSize, ...]:
    """How many of which structures go.

    Raises:
        InputError: as :func:`srcr.structure.sizes.structure_sizes`.
    """
    if plan.structures is None:
        return ()
    quant = plan.quant if isinstance(plan, Recipe) else None
    return structure_sizes(opened, plan.structures, quant.group_size if quant else None)


def resolve_plan(
    plan: CompressionPlan | Recipe, opened: OpenModel, seed: int | None, fmt: Format
) -> tuple[CompressionPlan, str | None]:
    """The plan made explicit for a format and checked, and a note on its group sizes.

    Raises:
        InputError: it does not fit the model.
    """
    topology = opened.topology
    shapes, tables = topology.shapes, topology.embedding_shapes
    if isinstance(plan, Recipe):
        plan = uniform_plan(shapes, plan, tables, topology.left_alone)
    check_plan(plan, shapes, tables)
    plan, sizes = resolve_for(fmt, plan, opened)
    _check_scales(plan, fmt, fmt.scale_dtype(opened.dtype))
    return (plan if seed is None else replace(plan, seed=seed)), sizes


def _check_scales(plan: CompressionPlan, fmt: Format, stored: ScaleDtype | None) -> None:
    """Refuse scales of another precision than the ``stored`` one of a format.

    Raises:
        InputError: names the layer.
    """
    if fmt.any_scale_dtype:
        return
    for layer in (*plan.layers, *(plan.embeddings or ())):
        asked = None if layer.quant is None else layer.quant.scale_dtype
        if asked not in (None, stored):
            raise InputError(
                f"the plan wants {asked} scales for {layer.name}, which {fmt.name} does not store: leave "
                "scale_dtype out of the plan, or name the format that it was made for"
            )


def pick_format(name: str | None, contents: Contents) -> tuple[Format, str | None]:
    """The format of that name; without a name the default where it can hold the contents, else the fallback
    and why.

    Raises:
        InputError: the named format cannot hold the contents.
    """
    fmt = get_format(name or DEFAULT_FORMAT)
    try:
        fmt.check(contents)
    except InputError as error:
        if name is not None:
            raise
        return get_format(FALLBACK_FORMAT), f"format {FALLBACK_FORMAT}: {error}"
    return fmt, None
