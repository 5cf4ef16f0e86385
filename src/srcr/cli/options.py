"""Options that every command which calibrates or writes a model shares: from the command line, from a
``--config`` file with the same names, or the defaults; in that order."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srcr.data.specs import Calibration, RecoveryText
from srcr.environment import parse_size
from srcr.errors import InputError
from srcr.methods import check_methods, get_pruner, get_quantizer
from srcr.pipelines.options import RunOptions
from srcr.plans.plan import CompressionPlan, Recipe, read_plan
from srcr.plans.recovery import RecoverySpec, parse_duration
from srcr.plans.settings import RecipeSettings, recipe_of, settings_of
from srcr.plans.specs import Mode, Override
from srcr.records.sharing import shareable
from srcr.serialize import from_dict, from_yaml, to_yaml
from srcr.storage.files import write_text
from srcr.storage.layout import PLAN, RUN

if TYPE_CHECKING:
    from srcr.pipelines.training import Recovery
    from srcr.planning.space import SearchSpace
    from srcr.planning.specs import Resources

#: Options that say what a plan says.
DECIDED_BY_A_PLAN = tuple(RecipeSettings.__annotations__)
#: Options that say what a sensitivity table says.
DECIDED_BY_A_TABLE = (
    "sparsities", "widths", "group_size", "symmetric", "prune_method", "quant_method",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Everything is optional: None means "as the config file, or the default, says"."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read by pydantic

    model: str | None = None
    out: str | None = None
    sparsity: float | None = None
    structure: str | None = None
    bits: int | None = None
    group_size: str | int | None = None
    symmetric: bool | None = None
    prune_method: str | None = None
    quant_method: str | None = None
    mode: Mode | None = None
    dampening_frac: float | None = None
    dense_targets: bool | None = None
    dense_share: float | None = None
    descent_rounds: int | None = None
    expert_prior: float | None = None
    expert_gates: bool | None = None
    targets: str | list[str] | None = None
    ignore: str | list[str] | None = None
    overrides: dict[str, Override] | None = None
    embeddings: int | None = None
    remove: str | dict[str, int | float] | None = None
    recover: str | None = None
    plan: str | None = None
    calibration: str | None = None
    samples: int | None = None
    seq_len: int | None = None
    format: str | None = None
    seed: int | None = None
    device: str | None = None
    memory: str | None = None
    cache: bool | None = None
    allow_requantize: bool | None = None
    sparsities: list[float] | None = None
    widths: list[int] | None = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any], config: Path | None) -> "Options":
        """The options among a command's arguments, by their names; what is not given there, of the file.

        Raises:
            InputError: a value that is none; the file cannot be read, or has a key that is no option.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        given = {name: arguments[name] for name in names if arguments.get(name) not in (None, [])}
        for name, number in (("sparsities", float), ("widths", int)):
            if name in given:
                given[name] = _numbers(given[name], name, number)
        given |= {name: str(given[name]) for name in ("plan", "out") if name in given}
        options = from_dict(cls, given, where="the command line")
        if config is None:
            return options
        read = from_yaml(cls, config)
        if read.plan is not None and (config.parent / read.plan).is_file():
            read = replace(read, plan=str(config.parent / read.plan))
        return replace(read, **{name: getattr(options, name) for name in given})

    def place(self) -> tuple[str, Path]:
        """The model, and the folder to write.

        Raises:
            InputError: one is named neither on the command line nor in the config file.
        """
        if self.model is None:
            raise InputError(
                "no model: name it behind the command, or as model: in the --config file"
            )
        if self.out is None:
            raise InputError("no output: name it with -o, or as out: in the --config file")
        return self.model, Path(self.out)

    def write_run(self, format_name: str) -> None:
        """Write what ran beside its result."""
        _, out = self.place()
        write_text(out / RUN, to_yaml(self.resolved(format_name)))

    def resolved(self, format_name: str) -> dict[str, Any]:
        """What ran, by the names of the options, defaults filled in: a ``--config`` file that runs it again.
        Where it went and what decides about nothing but how it runs (device, memory, cache) is left out."""
        data, plan = self.data(), {}
        if self.plan is None:
            recipe = self.compression()
            assert isinstance(recipe, Recipe)
            plan = settings_of(recipe)
        values = {
            "model": self.model, **plan, "plan": self.plan and PLAN,
            "recover": self.recover, "calibration": data.source, "samples": data.samples,
            "seq_len": data.seq_len, "format": format_name,
            "seed": RunOptions().seed if self.seed is None else self.seed,
            "allow_requantize": self.allow_requantize,
        }  # fmt: skip
        return shareable({name: value for name, value in values.items() if value is not None})

    def compression(self) -> CompressionPlan | Recipe:
        """The plan that was named, or the uniform recipe that the options describe.

        Raises:
            InputError: values out of range, unknown names, or a plan together with what it decides.
        """
        if self.plan is not None:
            for name in DECIDED_BY_A_PLAN:
                if getattr(self, name) is not None:
                    option = name.replace("_", "-")
                    raise InputError(
                        f"--plan decides {option}: leave --{option} out, or edit the plan"
                    )
            return read_plan(Path(self.plan))
        names = RecipeSettings.__annotations__
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        recipe = recipe_of(given)
        check_methods(recipe)
        for name, known in (("prune_method", get_pruner), ("quant_method", get_quantizer)):
            if name in given:  # of what is not done, too
                known(given[name])
        return recipe

    def space(self) -> "SearchSpace":
        """The levels that a plan chooses from, and how each is made.

        Raises:
            InputError: as :meth:`compression`; options that the levels decide.
        """
        from srcr.planning.space import SearchSpace, level_grid
        from srcr.planning.specs import BITS, SPARSITIES

        for name in ("targets", "ignore", "overrides", "embeddings", "remove"):
            if getattr(self, name) is not None:
                raise InputError(
                    f"{name} is for 'srcr compress': here every layer of the blocks has a level; edit the "
                    "plan that 'srcr plan' writes, and give it to 'srcr compress --plan'"
                )
        for name in ("sparsity", "structure", "bits", "plan"):
            if getattr(self, name) is not None:
                raise InputError(
                    f"--{name} is for one treatment of all layers; here --sparsities and --widths name what "
                    "each layer may have"
                )
        recipe = replace(self, sparsity=0.5, bits=4, sparsities=None, widths=None).compression()
        assert isinstance(recipe, Recipe)
        assert recipe.prune is not None
        assert recipe.quant is not None
        sparsities = SPARSITIES if self.sparsities is None else self.sparsities
        levels = level_grid(sparsities, BITS if self.widths is None else self.widths)
        return SearchSpace(levels, recipe.prune, recipe.quant, recipe.solver)

    def check_table(self) -> None:
        """Refuse what a sensitivity table decides.

        Raises:
            InputError: names the option.
        """
        for name in DECIDED_BY_A_TABLE:
            if getattr(self, name) is not None:
                option = name.replace("_", "-")
                raise InputError(
                    f"--table decides {option}: leave --{option} out, or make another table"
                )

    def data(self) -> Calibration:
        """Where calibration data comes from."""
        given: dict[str, Any] = {
            "source": self.calibration,
            "samples": self.samples,
            "seq_len": self.seq_len,
        }
        return Calibration(**{key: value for key, value in given.items() if value is not None})

    def training(self) -> RecoverySpec | None:
        """How the result is trained; None where that is not asked for.

        Raises:
            InputError: its duration is none.
        """
        if self.recover is None:
            return None
        return from_dict(RecoverySpec, parse_duration(self.recover), "the options")

    def recovery(self) -> "Recovery | None":
        """The training that follows a compression, on the text of the calibration."""
        from srcr.pipelines.training import Recovery

        spec, data = self.training(), self.data()
        if spec is None:
            return None
        return Recovery(spec, RecoveryText((data.source,), seq_len=data.seq_len))

    def run(self, command: str) -> RunOptions:
        """How the run goes, whatever it does."""
        names = ("seed", "device", "memory", "cache", "allow_requantize")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return RunOptions(command=command, **given)


def resources(database: Path | None, limit: str | None, ray: str | None) -> "Resources":
    """What a search may use.

    Raises:
        InputError: the limit is no size.
    """
    from srcr.planning.specs import Resources

    return Resources(database, None if limit is None else parse_size(limit), ray)


def split_names(text: str) -> tuple[str, ...]:
    """Names that are separated by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str, option: str, kind: type[int] | type[float]) -> list[Any]:
    """Numbers that are separated by commas."""
    try:
        return [kind(part) for part in split_names(text)]
    except ValueError:
        raise InputError(f"--{option} {text!r}: give numbers separated by commas") from None
