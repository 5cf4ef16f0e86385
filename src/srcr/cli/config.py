"""``--config``: a YAML file with the options of a command by name, read as if they had been typed; what is
typed wins."""

import difflib
import json
from pathlib import Path
from typing import Any

import typer

from srcr.errors import InputError
from srcr.plans.settings import RecipeSettings

#: Options that are not for a file.
TYPED = ("config", "help")
#: Options whose files are looked for beside the config file first.
BESIDE = ("plan", "table")
#: Options that say what a plan says.
DECIDED_BY_A_PLAN = tuple(RecipeSettings.__annotations__)
#: Options that stand, where they are typed, for others of the file.
INSTEAD = {
    "minutes": ("steps",),
    "steps": ("minutes",),
    "target": ("constraint",),
    "constraint": ("target",),
    "plan": DECIDED_BY_A_PLAN,
}


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """The path of a config file, whose options stand for those that are not typed.

    Raises:
        InputError: it cannot be read; a key is no option of the command, or its value none of it.
    """
    if path is None or context.resilient_parsing:
        return path
    from srcr.serialize import read_yaml

    values = read_yaml(path)
    if not isinstance(values, dict):
        raise InputError(f"{path} is no config file: give options by name, as bits: 3")
    known = {each.name: each for each in context.command.params if each.name not in TYPED}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), [str(each) for each in known], 1)
            meant = f", did you mean {near[0]}?" if near else ":"
            raise InputError(
                f"{path}: {name} is no option of 'srcr {context.command.name}'{meant} see its --help"
            )
    context.default_map = {
        name: _value(context, known[name], value, path)
        for name, value in values.items()
        if value is not None
    }
    return path


def forget_replaced(context: typer.Context) -> None:
    """Drop values of a config file that something typed stands for."""

    def came_from(name: str, source: str) -> bool:
        return getattr(context.get_parameter_source(name), "name", None) == source

    for name, others in INSTEAD.items():
        if came_from(name, "COMMANDLINE"):
            replaced = [each for each in others if came_from(each, "DEFAULT_MAP")]
            context.params |= dict.fromkeys(replaced)


def _value(context: typer.Context, option: Any, value: Any, path: Path) -> Any:
    """A value of the file as it would be typed, tried.

    Raises:
        InputError: it is none of the option's.
    """
    several = option.multiple or option.nargs == -1
    if isinstance(value, bool) and getattr(option, "is_flag", False):
        return value
    typed: Any = [_text(each) for each in _listed(value)] if several else _text(value)
    if option.name in BESIDE and (path.parent / typed).is_file():
        typed = str(path.parent / typed)
    try:
        option.process_value(context, typed)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except typer.BadParameter as error:
        raise InputError(f"{path}: {option.name} {value!r}: {error.message}") from None
    return typed


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def _text(value: Any) -> str:
    """A value as it is typed: lists with commas, amounts as "layers=2", other mappings as JSON."""
    if isinstance(value, list):
        return ",".join(str(each) for each in value)
    if isinstance(value, dict):
        if any(isinstance(each, dict | list) for each in value.values()):
            return json.dumps(value)
        return ",".join(f"{name}={amount}" for name, amount in value.items())
    return str(value)
