"""An option of the command line, and the group that help shows it in."""

import json
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from typing_extensions import get_type_hints

from srcr.errors import InputError, nearest
from srcr.plans.settings import Setting

#: Groups of options in the help of a command.
TEXT, RUN, SEARCH, TRAINING = "Text", "Run", "Search", "Training"
WEIGHTS, MEASURES, OUTPUT = "Weights", "Measures", "Output"


def option(
    group: str,
    text: str,
    *flags: str,
    default: object = None,
    choices: tuple[str, ...] = (),
    metavar: str | None = None,
    **more: Any,
) -> Any:
    """An option of a group. ``default``: what stands for it where it is not given, as help shows it;
    ``choices``: its name, and those that it may have; ``more``: what else typer is told."""
    setting = Setting(group, text, default, metavar)
    flag, *names = choices or ("",)
    return _option(setting, flags, (_choice(flag, names) if names else {}) | more)


def annotations(options: Any) -> dict[str, Any]:
    """The type and the typer option of every key of a TypedDict, by name. Those of a :class:`Setting` become
    an option; what need not be given may be None."""
    hints = get_type_hints(options, include_extras=True)
    return {
        name: _annotated(name, hint, name in options.__required_keys__)
        for name, hint in hints.items()
    }


def _annotated(name: str, hint: Any, required: bool) -> Any:
    kind, told = get_args(hint)
    info = _of_setting(name, kind, told) if isinstance(told, Setting) else told
    typed = _kind(kind)
    return Annotated[typed if required else typed | None, info]


def _kind(hint: Any) -> Any:
    """The type of what is typed for a value of a type: several texts, a text, or a number."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if any(get_origin(kind) is list for kind in kinds):
        return list[str]
    if str in kinds or any(get_origin(kind) in (dict, Literal) for kind in kinds):
        return str
    return hint


def _of_setting(name: str, kind: Any, setting: Setting) -> Any:
    """The option that gives a setting."""
    flag = name.replace("_", "-")
    flags = [f"--{flag}"]
    if kind is bool:
        other = "asymmetric" if name == "symmetric" else f"no-{flag}"
        flags = [f"--{flag}/--{other}"]
    more: dict[str, Any] = {}
    if get_origin(kind) is Literal:
        more = _choice(flag, get_args(kind))
    elif get_origin(kind) is dict:
        more = {"parser": _mapping}
    return _option(setting, flags, more)


def _option(setting: Setting, flags: Sequence[str], more: dict[str, Any]) -> Any:
    """A typer option with the setting's help."""
    default = "" if setting.default is None else f" [default: {setting.default}]"
    return typer.Option(
        *flags,
        help=setting.text + default,
        rich_help_panel=setting.group,
        show_default=False,
        hidden=setting.hidden,
        **({"metavar": setting.metavar} | more),
    )


def _choice(flag: str, names: Sequence[str]) -> dict[str, Any]:
    """What typer is told of an option that is one of these names."""
    return {
        "metavar": "|".join(names),
        "parser": _chosen(flag, names),
        "autocompletion": lambda: list(names),
    }


def _chosen(flag: str, names: Sequence[str]) -> Callable[[str], str]:
    """What reads one of these names."""

    def read(text: str) -> str:
        if text not in names:
            raise InputError(f"--{flag} {text!r} is not known: {nearest(text, names)}")
        return text

    return read


def _mapping(text: str) -> dict[str, Any]:
    """A mapping, as JSON has it."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        example = '{"*.down_proj": {"bits": 6}}'
        raise InputError(f"{text!r} is no mapping of patterns to what they get, such as {example}")
    return value


def listed(values: Iterable[object]) -> str:
    """Values as an option takes them, with commas between."""
    return ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
