"""Tables on the terminal: a title of one line, and names that are cut in the middle."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from srcr.pipelines.shortened import Shortened, shorten


class TitledTable:
    """A table whose first column holds names and the others numbers (or ``words``), under a title that takes
    the whole width of the terminal."""

    def __init__(self, title: str, *columns: str, words: bool = False) -> None:
        self._title = title
        headed = any(columns)
        self._table = Table(
            header_style="bold",
            box=SIMPLE_HEAD,
            show_edge=False,
            collapse_padding=True,
            pad_edge=False,
            show_header=headed,
        )
        for number, column in enumerate(columns):
            self._table.add_column(column, justify="right" if number and not words else "left")

    def add_row(self, name: str, *cells: str, style: str | None = None) -> None:
        """Add a row; the name is cut in the middle where there is no room for it."""
        self._table.add_row(Shortened(name), *cells, style=style)

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        """The title, and the table."""
        yield Text(shorten(self._title, options.max_width), style="italic", no_wrap=True)
        yield self._table
        yield ""


def show(*parts: Any) -> None:
    """Print on stdout."""
    console = Console(highlight=False)
    for part in parts:
        console.print(part)


def folded(rows: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Rows (name, content) with those that follow each other and hold the same in one.

    >>> folded([("h.0", 1), ("h.1", 1), ("h.2", 2)])
    [('h.0 … 1 (× 2)', 1), ('h.2', 2)]
    """
    result: list[tuple[str, Any]] = []
    first = 0
    for number, (_, content) in enumerate(rows):
        if number + 1 < len(rows) and rows[number + 1][1] == content:
            continue
        count, name = number + 1 - first, rows[first][0]
        if count > 1:
            name = f"{name} … {rows[number][0].rpartition('.')[2]} (× {count})"
        result.append((name, content))
        first = number + 1
    return result


def without_prefix(names: Sequence[str]) -> tuple[str, list[str]]:
    """The modules that all names begin with, and the names without them.

    >>> without_prefix(["model.layers.0.mlp", "model.layers.1.mlp"])
    ('model.layers', ['0.mlp', '1.mlp'])
    """
    parts = [name.split(".") for name in names]
    common = 0
    while all(len(part) > common + 1 for part in parts) and len({p[common] for p in parts}) == 1:
        common += 1
    return ".".join(parts[0][:common]) if parts else "", [".".join(p[common:]) for p in parts]
