"""A plan made explicit, and checked against the shapes of a model, before any work is done."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from srcr.errors import InputError
from srcr.numerics.sparsity import parse_structure
from srcr.numerics.super_blocks import SUPER_BLOCK
from srcr.plans.patterns import check_patterns, matches, matches_any
from srcr.plans.plan import CompressionPlan, LayerPlan, Recipe
from srcr.plans.specs import QuantSpec, ScaleDtype

#: Group sizes where none was asked for: the first that divides the width.
AUTO_GROUPS = (128, 64, 32)

#: (out_features, in_features) of each linear layer by name.
Shapes = Mapping[str, tuple[int, int]]


def uniform_plan(
    shapes: Shapes, recipe: Recipe, embeddings: Shapes | None = None, others: Iterable[str] = ()
) -> CompressionPlan:
    """The recipe, layer by layer; what it leaves alone has neither a prune nor a quant. ``embeddings``:
    shapes of the input embedding and the output head by name; ``others``: names that may be ignored as well.

    Raises:
        InputError: a pattern matches nothing; nothing is left to compress.
    """
    tables = embeddings or {}
    check_patterns("targets", recipe.targets, shapes)
    check_patterns("ignore", recipe.ignore, [*shapes, *tables, *others])
    check_patterns("overrides", recipe.overrides, shapes)
    quantized = None
    if recipe.embeddings is not None:
        quantized = tuple(
            LayerPlan(name, None, recipe.embeddings)
            for name in tables
            if not matches_any(name, recipe.ignore)
        )
    layers = tuple(_layer(name, recipe) for name in shapes)
    nothing = not any(layer.prune or layer.quant for layer in [*layers, *(quantized or ())])
    if nothing and (recipe.prune or recipe.quant):
        raise InputError(
            "targets, ignore and overrides leave nothing to compress: name fewer layers to ignore, or more "
            "targets"
        )
    return CompressionPlan(layers, solver=recipe.solver, embeddings=quantized or None)


def is_left_alone(name: str, targets: Sequence[str], ignore: Sequence[str]) -> bool:
    """Whether a layer is not among the targets, or is ignored."""
    return bool(targets and not matches_any(name, targets)) or matches_any(name, ignore)


def _layer(name: str, recipe: Recipe) -> LayerPlan:
    """What a recipe does to a linear layer."""
    if is_left_alone(name, recipe.targets, recipe.ignore):
        return LayerPlan(name)
    prune, quant = recipe.prune, recipe.quant
    for pattern, override in recipe.overrides.items():
        if matches(name, pattern):
            prune, quant = override.applied(prune, quant)
    return LayerPlan(name, prune, quant)


def resolve_group_sizes(
    plan: CompressionPlan,
    shapes: Shapes,
    embeddings: Shapes | None = None,
    choices: Sequence[int] = AUTO_GROUPS,
    common_widths: Mapping[str, Collection[int]] = MappingProxyType({}),
) -> tuple[CompressionPlan, str | None]:
    """The plan with every "auto" group size made explicit, and a note that says how many became which: the
    first of ``choices`` that divides the width, else -1. With zero-points it is the first that divides all
    their widths, since engines that load them take one setting only; where ``common_widths`` has widths for a
    linear, by name, the first that divides those."""
    widths = _widths(shapes, embeddings)
    with_zero_points = {
        widths[layer.name]
        for layer in (*plan.layers, *(plan.embeddings or ()))
        if layer.quant is not None and not layer.quant.symmetric
    }
    sizes: list[int] = []

    def resolved(name: str, quant: QuantSpec) -> QuantSpec:
        if quant.group_size != "auto":
            return quant
        divided = common_widths.get(name, {widths[name]}) if quant.symmetric else with_zero_points
        fitting = (size for size in choices if all(width % size == 0 for width in divided))
        sizes.append(next(fitting, -1))
        return replace(quant, group_size=sizes[-1])

    explicit = _each_quant(plan, resolved)
    if not sizes:
        return plan, None
    counts = [f"{size} for {sizes.count(size)}" for size in choices if size in sizes]
    if -1 in sizes:
        counts.append(f"channel-wise for {sizes.count(-1)}, whose width none divides")
    note = f"group size auto: of {len(sizes)} layers {', '.join(counts)}"
    return explicit, note


def resolve_scale_bits(
    plan: CompressionPlan,
    shapes: Shapes,
    embeddings: Shapes | None = None,
    choices: Mapping[int, tuple[int, int]] | None = None,
) -> CompressionPlan:
    """The plan with scales in units of their super-blocks where a format has such for its widths: ``choices``
    are the group size and the bits of a scale by the bits of a code. Only where the group size is "auto", the
    grid is symmetric, and super-blocks divide the width."""
    if not choices:
        return plan
    widths = _widths(shapes, embeddings)

    def resolved(name: str, quant: QuantSpec) -> QuantSpec:
        if quant.group_size != "auto" or not quant.symmetric:
            return quant
        if quant.num_bits not in choices or widths[name] % SUPER_BLOCK:
            return quant
        size, bits = choices[quant.num_bits]
        return replace(quant, group_size=size, scale_bits=bits)

    return _each_quant(plan, resolved)


def resolve_scale_dtype(plan: CompressionPlan, dtype: ScaleDtype | None) -> CompressionPlan:
    """The plan with scales of ``dtype`` where it says nothing of them."""
    if dtype is None:
        return plan
    return _each_quant(
        plan, lambda _, quant: replace(quant, scale_dtype=quant.scale_dtype or dtype)
    )


def _widths(shapes: Shapes, embeddings: Shapes | None) -> dict[str, int]:
    """The width of every linear, embedding and head by name."""
    return {name: width for name, (_, width) in [*shapes.items(), *(embeddings or {}).items()]}


def _each_quant(
    plan: CompressionPlan, change: Callable[[str, QuantSpec], QuantSpec]
) -> CompressionPlan:
    """The plan with ``change`` applied to how every layer and embedding is quantized, given its name."""

    def changed(layer: LayerPlan) -> LayerPlan:
        if layer.quant is None:
            return layer
        return replace(layer, quant=change(layer.name, layer.quant))

    tables = tuple(map(changed, plan.embeddings or ())) or None
    return replace(plan, layers=tuple(map(changed, plan.layers)), embeddings=tables)


def check_plan(plan: CompressionPlan, shapes: Shapes, embeddings: Shapes | None = None) -> None:
    """Refuse a plan that does not fit the model.

    Raises:
        InputError: unknown or repeated layers, widths that a group size or an N:M pattern does not divide, a
            pruned embedding.
    """
    tables = embeddings or {}
    _check_names(plan.layers, shapes, "no linear layer of the model's blocks")
    _check_names(
        plan.embeddings or (), tables, "neither its input embedding nor its own output head"
    )
    for layer in plan.layers:
        _check_layer(layer, shapes[layer.name][1])
    for layer in plan.embeddings or ():
        _check_layer(layer, tables[layer.name][1])
        if layer.prune is not None:
            raise InputError(
                f"the plan prunes {layer.name}: embeddings and heads are only quantized, leave prune out"
            )


def _check_names(layers: Sequence[LayerPlan], shapes: Shapes, what: str) -> None:
    names = [layer.name for layer in layers]
    unknown = [name for name in names if name not in shapes]
    if unknown:
        known = f" (they are called like {next(iter(shapes))!r})" if shapes else ""
        raise InputError(f"the plan names {unknown[0]!r}, which is {what}{known}")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"the plan names {twice!r} twice")


def _check_layer(layer: LayerPlan, width: int) -> None:
    if layer.quant is not None:
        size = layer.quant.group_size
        if isinstance(size, int) and size != -1 and width % size:
            raise InputError(
                f"group size {size} does not divide the width {width} of {layer.name}: use a "
                "divisor, -1 (channel-wise) or auto"
            )
        if layer.quant.scale_bits is not None and width % SUPER_BLOCK:
            raise InputError(
                f"scale_bits needs a width that {SUPER_BLOCK} divides, and that of {layer.name} is {width}: "
                "leave scale_bits out of the plan for this layer"
            )
    if layer.prune is not None:
        pattern = parse_structure(layer.prune.mask_structure)
        if pattern and width % pattern[1]:
            raise InputError(
                f"{layer.prune.mask_structure} sparsity needs widths that {pattern[1]} divides; "
                f"{layer.name} has {width}: use another pattern or unstructured"
            )
