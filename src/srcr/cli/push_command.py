"""The command that uploads what was compressed."""

from typing import Annotated

import typer

from srcr.cli import parameters as given
from srcr.cli.app import Command, app, print_json


@app.command(cls=Command)
def push(
    folder: given.Folder,
    repo: Annotated[
        str,
        typer.Argument(
            metavar="REPO", help="The repository on the hub, as name/model.", show_default=False
        ),
    ],
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace files of the same names in one that exists."),
    ] = False,
    as_json: given.Json = False,
) -> None:
    """Upload a compressed model, its card and its records to the Hugging Face Hub."""
    from srcr.environment import format_bytes
    from srcr.pipelines.push import push as run
    from srcr.serialize import to_dict

    record = run(folder, repo, private, overwrite)
    if as_json:
        print_json(to_dict(record))
    else:
        typer.echo(f"{record.url}: {len(record.files)} files, {format_bytes(record.n_bytes)}")
