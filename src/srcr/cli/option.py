"""An option of the command line, and the group that help shows it in."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import typer

from srcr.errors import InputError, nearest

#: Groups of options in the help of a command.
WEIGHTS, LAYERS, TEXT, RUN = "Weights", "Which layers", "Text", "Run"
SEARCH, TRAINING, MEASURES, OUTPUT = "Search", "Training", "Measures", "Output"


def option(
    group: str,
    text: str,
    *flags: str,
    default: object = None,
    choices: tuple[str, ...] = (),
    metavar: str | None = None,
) -> Any:
    """An option of a group. ``default``: what stands for it where it is not given, as help shows it;
    ``choices``: its name, and those that it may have."""
    if default is not None:
        text += f" [default: {default}]"
    more: dict[str, Any] = {"metavar": metavar}
    if choices:
        flag, *names = choices
        more |= {
            "metavar": "|".join(names),
            "parser": _chosen(flag, names),
            "autocompletion": lambda: list(names),
        }
    return typer.Option(*flags, help=text, rich_help_panel=group, show_default=False, **more)


def _chosen(flag: str, names: Sequence[str]) -> Callable[[str], str]:
    """What reads one of these names."""

    def read(text: str) -> str:
        if text not in names:
            raise InputError(f"--{flag} {text!r} is not known: {nearest(text, names)}")
        return text

    return read


def listed(values: Iterable[object]) -> str:
    """Values as an option takes them, with commas between."""
    return ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
