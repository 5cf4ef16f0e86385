"""A recipe by the names that the command line and keywords of Python use."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from typing_extensions import TypedDict

from srcr.errors import InputError
from srcr.numerics.sparsity import UNSTRUCTURED, parse_structure
from srcr.plans.plan import Recipe
from srcr.plans.specs import Mode, Override, PruneSpec, QuantSpec, SolverSpec
from srcr.plans.structures import STRUCTURES, structure_spec
from srcr.serialize import STRICT, from_dict, to_dict

#: Settings of the solver, by the same names.
SOLVER = (
    "mode", "dampening_frac", "dense_targets", "dense_share", "descent_rounds", "expert_prior",
    "expert_gates",
)  # fmt: skip
#: Bits that stand for no quantization.
UNQUANTIZED = 16


@dataclass(frozen=True)
class Setting:
    """What people are told of a setting: the ``group`` of options that it belongs to, a ``text``, what stands
    for it where it is not given (``default``), how the value is called (``metavar``). ``hidden``: help of the
    command line leaves it out."""

    group: str
    text: str
    default: object = None
    metavar: str | None = None
    hidden: bool = False


def _weights(text: str, default: object, metavar: str | None = None) -> Setting:
    return Setting("Weights", text, default, metavar)


def _layers(text: str, default: object = None) -> Setting:
    return Setting("Which layers", text, default, "PATTERN")


def _solver(name: str, text: str, metavar: str | None = None) -> Setting:
    return Setting("Solver", text, getattr(SolverSpec, name), metavar, hidden=True)


class UniformSettings(TypedDict, total=False):
    """How much goes from every layer."""

    sparsity: Annotated[float, _weights("Share of the weights that become zero, 0 to 1.", 0, "S")]
    structure: Annotated[
        str, _weights("unstructured, or N:M (N of every M are kept).", UNSTRUCTURED, "N:M")
    ]
    bits: Annotated[int, _weights("2 to 8; 16 quantizes nothing.", QuantSpec.num_bits, "B")]


class LevelSettings(TypedDict, total=False):
    """How it goes."""

    group_size: Annotated[
        int | str,
        _weights(
            "Columns that share a scale: auto (128, 64 or 32, the first that divides, else -1), -1 (the "
            "whole row) or a number.",
            QuantSpec.group_size,
            "N",
        ),
    ]
    symmetric: Annotated[bool, _weights("Without or with zero-points.", "symmetric")]
    prune_method: Annotated[str, _weights("See 'srcr methods'.", PruneSpec.method, "NAME")]
    quant_method: Annotated[str, _weights("See 'srcr methods'.", QuantSpec.method, "NAME")]


class LayerSettings(TypedDict, total=False):
    """Of what it goes."""

    embeddings: Annotated[
        int,
        _weights(
            "Bits of the input embedding and the output head, 4 to 8; 16 leaves them alone.",
            16,
            "B",
        ),
    ]
    targets: Annotated[
        str | list[str] | tuple[str, ...],
        _layers(
            "Compress only layers that match: a glob ('*.mlp.*') or re: and a regular expression; may be "
            "given several times.",
            "all",
        ),
    ]
    ignore: Annotated[
        str | list[str] | tuple[str, ...],
        _layers("Leave layers alone that match, as --targets; may be given several times."),
    ]


class RecipeSettings(UniformSettings, LevelSettings, LayerSettings, total=False):
    """What a recipe may be told, in Python, in config files and on the command line; what is left out is as
    the specifications say."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    mode: Annotated[Mode, _weights("One pass, or the paper's sequences.", SolverSpec.mode)]
    remove: Annotated[
        str | dict[str, int | float],
        _weights(
            "Whole structures that go before: channels, heads (key-value heads with their query heads), "
            "layers and experts, a share or a count each, as channels=0.25,heads=1,layers=2.",
            "nothing",
            "WHAT",
        ),
    ]
    overrides: Annotated[
        dict[str, Override],
        Setting("Which layers", "What layers that match get instead.", hidden=True),
    ]
    dampening_frac: Annotated[float, _solver("dampening_frac", "Damping of the Hessian.", "D")]
    dense_targets: Annotated[bool, _solver("dense_targets", "Aim at the dense model's outputs.")]
    dense_share: Annotated[float, _solver("dense_share", "Share of the data for that.", "S")]
    descent_rounds: Annotated[int, _solver("descent_rounds", "Rounds of descent.", "N")]
    expert_prior: Annotated[
        float, _solver("expert_prior", "Tokens an input that an expert's prior counts as.", "N")
    ]
    expert_gates: Annotated[bool, _solver("expert_gates", "Weigh tokens by their gates.")]


def recipe_of(settings: Mapping[str, Any]) -> Recipe:
    """The recipe that :class:`RecipeSettings` describe.

    Raises:
        InputError: a name that is none of them, or a value out of range.

    >>> recipe_of({"sparsity": 0.25, "bits": 3}).quant.num_bits
    3
    """
    known = from_dict(RecipeSettings, dict(settings), "the settings")
    solver = {name: value for name, value in known.items() if name in SOLVER}
    bits = known.get("bits")
    return Recipe(
        _prune(known),
        _quant(known, bits),
        from_dict(SolverSpec, solver, "the settings"),
        _patterns(known.get("targets")),
        _patterns(known.get("ignore")),
        known.get("overrides", {}),
        _embeddings(known),
        structure_spec(known.get("remove")),
    )


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """The settings of a recipe, each by its name: :func:`recipe_of` makes the same of them again.

    >>> settings_of(recipe_of({"bits": 3}))["group_size"]
    'auto'
    """
    prune, quant = recipe.prune or PruneSpec(sparsity=0.0), recipe.quant
    settings: dict[str, Any] = {
        "sparsity": prune.sparsity,
        "structure": prune.mask_structure,
        "prune_method": prune.method,
        "bits": UNQUANTIZED if quant is None else quant.num_bits,
        "embeddings": UNQUANTIZED if recipe.embeddings is None else recipe.embeddings.num_bits,
        **{name: getattr(recipe.solver, name) for name in SOLVER},
    }
    quant = quant or recipe.embeddings
    if quant is not None:
        settings |= {
            "group_size": quant.group_size,
            "symmetric": quant.symmetric,
            "quant_method": quant.method,
        }
    for name in ("targets", "ignore"):
        settings[name] = list(getattr(recipe, name))
    if recipe.overrides:
        settings["overrides"] = {key: to_dict(each) for key, each in recipe.overrides.items()}
    if recipe.structures is not None:
        settings["remove"] = dict(recipe.structures.amounts())
    return {name: value for name, value in settings.items() if value not in (None, [])}


def _quant(settings: RecipeSettings, bits: int | None) -> QuantSpec | None:
    if bits == UNQUANTIZED:
        return None
    given: dict[str, Any] = {
        "method": settings.get("quant_method"),
        "num_bits": bits,
        "group_size": _group_size(settings.get("group_size")),
        "symmetric": settings.get("symmetric"),
    }
    return QuantSpec(**{name: value for name, value in given.items() if value is not None})


def _embeddings(settings: RecipeSettings) -> QuantSpec | None:
    bits = settings.get("embeddings", UNQUANTIZED)
    if bits != UNQUANTIZED and not 4 <= bits <= 8:
        raise InputError(f"embeddings {bits}: use 4 to 8 bits, or 16 to leave them alone")
    quant = _quant(settings, bits)
    return None if quant is None else replace(quant, actorder=None)


def _prune(settings: RecipeSettings) -> PruneSpec | None:
    structure, sparsity = settings.get("structure", UNSTRUCTURED), settings.get("sparsity")
    if structure in STRUCTURES:
        raise InputError(f"structure {structure}: use --remove {structure}=0.25")
    method = settings.get("prune_method", PruneSpec.method)
    if parse_structure(structure) is not None and sparsity is None:
        return PruneSpec.of(method, 0, structure)
    spec = PruneSpec(method, sparsity or 0.0, structure)
    return spec if spec.sparsity > 0 else None


def _group_size(given: int | str | None) -> int | Literal["auto"] | None:
    if given is None or given == "auto":
        return given  # type: ignore[return-value]
    try:
        size = int(given)
    except ValueError:
        size = 0
    if size != -1 and size < 1:
        raise InputError(f"group size {given!r}: use auto, -1 (channel-wise) or a number")
    return size


def _patterns(given: str | list[str] | tuple[str, ...] | None) -> tuple[str, ...]:
    """Patterns that were given once, several times, or not at all."""
    return (given,) if isinstance(given, str) else tuple(given or ())
