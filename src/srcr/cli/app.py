"""The typer application, and what every command says on its way out."""

import inspect
import json
import shlex
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn, get_args, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from srcr.cli.config import forget_replaced
from srcr.cli.option import annotations
from srcr.errors import printable

#: Exit code of a command that the user interrupted, as shells give it: 128 and the number of SIGINT.
INTERRUPTED = 130


#: Columns that help takes at most, of a wide terminal.
WIDEST_HELP = 140


def _format_options(command: Any, ctx: Any, formatter: Any) -> None:
    """Write the options of a command, a section for each of their groups."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record is not None:
            kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
            panel = getattr(parameter, "rich_help_panel", None) or kind
            sections.setdefault(panel, []).append((record[0].partition(" <")[0], record[1]))
    for panel, records in sections.items():
        with formatter.section(panel):
            formatter.write_dl(records)


class Command(TyperCommand):
    """A command whose help has its options in groups."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The arguments by their names alone."""
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, a section for each group."""
        _format_options(self, ctx, formatter)

    def invoke(self, ctx: Any) -> Any:
        """Run it, by what was typed and what a file says beside."""
        forget_replaced(ctx)
        return super().invoke(ctx)


class Commands(TyperGroup):
    """All commands; where the user interrupts one, what is left of its work is told."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options and the commands."""
        _format_options(self, ctx, formatter)
        with formatter.section("Commands"):
            commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
            formatter.write_dl(
                [(name, command.help or "") for name, command in commands if command]
            )

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was named."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:  # typer would leave without a word
            fail_interrupted(error)


app = typer.Typer(
    name="srcr",
    cls=Commands,
    help="Make a causal language model much smaller, and prove how much of its meaning is left.",
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDEST_HELP},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from srcr import __version__

        typer.echo(f"srcr {__version__}")
        raise typer.Exit


@app.callback()
def start(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Make a causal language model much smaller, and prove how much of its meaning is left."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def command(function: Callable[..., None]) -> Callable[..., None]:
    """The function, made a command of its name. The keys of the TypedDict that its keywords are annotated
    with (``**options: Unpack[...]``) are its arguments and options; it is given those that were set."""
    (options,) = get_args(get_type_hints(function, include_extras=True)["options"])

    def run(**values: Any) -> None:
        function(**{n: value for n, value in values.items() if value is not None and value != []})

    run.__annotations__ = annotations(options)
    kind, required = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.empty
    parameters = [
        inspect.Parameter(
            name,
            kind,
            annotation=hint,
            default=required if name in options.__required_keys__ else None,
        )
        for name, hint in run.__annotations__.items()
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    app.command(function.__name__, cls=Command, help=function.__doc__)(run)
    return function


def fail(message: str, code: int) -> NoReturn:
    """Say what went wrong, as one line, and leave.

    Raises:
        SystemExit: always, with ``code``.
    """
    sys.stdout.flush()
    typer.echo(f"error: {printable(message)}", err=True)
    raise SystemExit(code)


def fail_interrupted(error: KeyboardInterrupt) -> NoReturn:
    """Say what an interrupted command has left behind, and leave.

    Raises:
        SystemExit: always, with :data:`INTERRUPTED`.
    """
    fail(f"interrupted; {str(error) or 'nothing was written'}", INTERRUPTED)


def print_json(data: Any) -> None:
    """One JSON value on stdout."""
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))


def show_preview(preview: Any, as_json: bool | None) -> None:
    """What a command would come to, on stdout."""
    from srcr.cli import tables
    from srcr.serialize import to_dict

    if as_json:
        print_json(to_dict(preview))
    else:
        tables.preview(preview)


def command_line() -> str:
    """The command as a record keeps it, quoted for a shell."""
    return "srcr " + shlex.join(sys.argv[1:])
