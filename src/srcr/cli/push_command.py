"""The command that uploads what was compressed."""

from typing import Annotated

import typer
from typing_extensions import TypedDict, Unpack

from srcr.cli import parameters as given
from srcr.cli.app import command, print_json
from srcr.cli.option import OUTPUT, option


class Repository(TypedDict):
    """Where it goes."""

    repo: Annotated[str, given.argument("REPO", "The repository on the hub, as name/model.")]


class Choices(given.Json, total=False):
    """How it goes there."""

    private: Annotated[bool, option(OUTPUT, "Make a private repository.", "--private")]
    overwrite: Annotated[
        bool,
        option(OUTPUT, "Replace files of the same names in one that exists.", "--overwrite"),
    ]


class Push(given.Folder, Repository, Choices):
    """What 'srcr push' is given."""


@command
def push(**options: Unpack[Push]) -> None:
    """Upload a compressed model, its card and its records to the Hugging Face Hub."""
    from srcr.environment import format_bytes
    from srcr.pipelines.push import push as run
    from srcr.serialize import to_dict

    private, overwrite = options.get("private", False), options.get("overwrite", False)
    record = run(options["folder"], options["repo"], private, overwrite)
    if options.get("as_json"):
        print_json(to_dict(record))
    else:
        typer.echo(f"{record.url}: {len(record.files)} files, {format_bytes(record.n_bytes)}")
