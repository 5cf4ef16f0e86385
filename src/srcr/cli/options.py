"""What the options of a command come to: recipes, plans, texts, and how a run goes. Each function reads those
that were given, by their names, and leaves the others to the specifications."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srcr.cli.app import command_line
from srcr.cli.config import DECIDED_BY_A_PLAN
from srcr.cli.option import listed
from srcr.cli.parameters import Calibrating
from srcr.data.specs import Calibration, RecoveryText
from srcr.environment import parse_size
from srcr.errors import InputError
from srcr.methods import check_methods, get_pruner, get_quantizer
from srcr.pipelines.options import Output, RunOptions
from srcr.plans.plan import CompressionPlan, Recipe, read_plan
from srcr.plans.recovery import RecoverySpec, parse_duration
from srcr.plans.settings import LayerSettings, LevelSettings, recipe_of, settings_of
from srcr.records.sharing import shareable
from srcr.serialize import from_dict, to_yaml
from srcr.storage.files import write_text
from srcr.storage.layout import PLAN, RUN

if TYPE_CHECKING:
    from srcr.pipelines.training import Recovery
    from srcr.planning.space import SearchSpace
    from srcr.planning.specs import Resources

Options = Mapping[str, Any]

#: Options that say how a level of a search is made.
LEVELS = (*LevelSettings.__annotations__, *LayerSettings.__annotations__)
#: Options that say what a sensitivity table says.
DECIDED_BY_A_TABLE = (
    "sparsities", "widths", *LEVELS, *Calibrating.__annotations__,
)  # fmt: skip
#: Options that decide nothing but how a run goes, where it goes, and how it is shown.
NO_RESULT = (
    "out", "overwrite", "as_json", "resume", "dry_run", "config", "device", "memory", "cache",
    "database", "database_limit", "ray", "storage", "study", "processes",
)  # fmt: skip


def picked(options: Options, *names: str, **fields: str) -> dict[str, Any]:
    """The options that were given, of these names; those of ``fields`` by the name of the field instead."""
    pairs = {name: name for name in names} | fields
    return {field: options[name] for field, name in pairs.items() if name in options}


def compression_of(options: Options) -> CompressionPlan | Recipe:
    """The plan that was named, or the uniform recipe that the options describe.

    Raises:
        InputError: values out of range, unknown names, or a plan together with what it decides.
    """
    given = picked(options, *DECIDED_BY_A_PLAN)
    if "plan" in options:
        for name in given:
            flag = name.replace("_", "-")
            raise InputError(f"--plan decides {flag}: leave --{flag} out, or edit the plan")
        return read_plan(Path(options["plan"]))
    recipe = recipe_of(given)
    check_methods(recipe)
    for name, known in (("prune_method", get_pruner), ("quant_method", get_quantizer)):
        if name in given:  # of what is not done, too
            known(given[name])
    return recipe


def space_of(options: Options) -> "SearchSpace":
    """The levels that a plan chooses from, and how each is made.

    Raises:
        InputError: as :func:`compression_of`; what should be numbers is none.
    """
    from srcr.planning.space import SearchSpace, level_grid
    from srcr.planning.specs import BITS, SPARSITIES

    recipe = compression_of(picked(options, *LEVELS) | {"sparsity": 0.5, "bits": 4})
    assert isinstance(recipe, Recipe)
    assert recipe.prune is not None
    assert recipe.quant is not None
    sparsities = _numbers(options, "sparsities", float, SPARSITIES)
    levels = level_grid(sparsities, _numbers(options, "widths", int, BITS))
    return SearchSpace(
        levels, recipe.prune, recipe.quant, recipe.solver,
        targets=recipe.targets, ignore=recipe.ignore, embeddings=recipe.embeddings,
    )  # fmt: skip


def check_table(options: Options) -> None:
    """Refuse what a sensitivity table decides.

    Raises:
        InputError: names the option.
    """
    for name in picked(options, *DECIDED_BY_A_TABLE):
        flag = name.replace("_", "-")
        raise InputError(f"--table decides {flag}: leave --{flag} out, or make another table")


def calibration_of(options: Options) -> Calibration:
    """Where calibration data comes from."""
    return Calibration(**picked(options, "samples", "seq_len", "chat", source="calibration"))


def training_of(options: Options) -> RecoverySpec | None:
    """How the result is trained; None where that is not asked for.

    Raises:
        InputError: its duration is none.
    """
    if "recover" not in options:
        return None
    return from_dict(RecoverySpec, parse_duration(options["recover"]), "the options")


def recovery_of(options: Options) -> "Recovery | None":
    """The training that follows a compression, on the text of the calibration."""
    from srcr.pipelines.training import Recovery

    spec, data = training_of(options), calibration_of(options)
    if spec is None:
        return None
    return Recovery(spec, RecoveryText((data.source,), seq_len=data.seq_len, chat=data.chat))


def run_of(options: Options) -> RunOptions:
    """How the run goes, whatever it does."""
    names = ("seed", "device", "memory", "cache", "allow_requantize")
    return RunOptions(command=command_line(), **picked(options, *names))


def output_of(options: Options) -> Output:
    """Where the result goes."""
    return Output(options["out"], **picked(options, "format", "overwrite", "resume"))


def resources_of(options: Options) -> "Resources":
    """What a search may use.

    Raises:
        InputError: the limit is no size.
    """
    from srcr.planning.specs import Resources

    limit = options.get("database_limit")
    return Resources(
        options.get("database"), None if limit is None else parse_size(limit), options.get("ray")
    )


def text_defaults(options: Options) -> dict[str, Any]:
    """The text that a compression measures on, by the names of options."""
    data = calibration_of(options)
    return {"calibration": data.source, "samples": data.samples, "seq_len": data.seq_len}


def recipe_defaults(options: Options) -> dict[str, Any]:
    """How weights are treated, by the names of options; of a plan nothing, as it says so itself."""
    recipe = compression_of(options)
    return settings_of(recipe) if isinstance(recipe, Recipe) and "plan" not in options else {}


def level_defaults(options: Options) -> dict[str, Any]:
    """What a search chooses from, by the names of options."""
    from srcr.planning.specs import BITS, SPARSITIES, SearchSpec
    from srcr.plans.objective import Objective

    recipe = compression_of(picked(options, *LEVELS) | {"sparsity": 0.5})
    assert isinstance(recipe, Recipe)
    measured = {"trials": SearchSpec.trials, "objective": Objective.measure}
    return {
        **({} if "constraint" in options else measured),
        "sparsities": listed(SPARSITIES), "widths": listed(BITS),
        **{name: value for name, value in settings_of(recipe).items() if name in LEVELS},
    }  # fmt: skip


def write_run(command: str, options: Options, defaults: Options) -> None:
    """Write what ran beside its result, by the names of the options: a ``--config`` file that runs it again.
    ``defaults``: what stood for those that were not given. Where it went, and what decides about nothing but
    how it runs, is left out."""
    values = {**defaults, **options}
    if "plan" in options:
        values["plan"] = PLAN  # which names its own seed
    else:
        values.setdefault("seed", 0)
    kept = {n: v for n, v in values.items() if v is not None and n not in NO_RESULT}
    head = f"# srcr {command} --config {RUN} -o OUT runs this again; paths are to be completed\n"
    write_text(Path(options["out"]) / RUN, head + to_yaml(shareable(kept)))


def split_names(text: str) -> tuple[str, ...]:
    """Names that are separated by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(
    options: Options, name: str, kind: type[int] | type[float], default: Sequence[Any]
) -> Sequence[Any]:
    """Numbers that are separated by commas; the default where the option is not given."""
    if name not in options:
        return default
    text = options[name]
    try:
        return [kind(part) for part in split_names(text)]
    except ValueError:
        raise InputError(f"--{name} {text!r}: give numbers separated by commas") from None
