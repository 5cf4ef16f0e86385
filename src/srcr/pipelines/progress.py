"""What people see while it runs: a bar on stderr with what is being done, what is left, and memory."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining

from srcr.environment import peak_memory


def console() -> Console:
    """Where people are spoken to: stderr, so that stdout stays for results."""
    return Console(stderr=True, highlight=False)


def say(note: str | None, quiet: bool = False) -> None:
    """Tell people something that they should know, if there is something."""
    if note and not quiet:
        console().print(f"note: {note}")


class Bar:
    """A stage of work. ``advance`` moves it; ``note`` says what is being done now."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def note(self, text: str, advance: float = 0) -> None:
        """Say what is being done, and move on."""
        memory = f"{peak_memory() / 1e9:.2f} GB"
        self._progress.update(self._task, note=text, memory=memory, advance=advance)

    def reach(self, done: float, text: str = "") -> None:
        """Say how much is done in all."""
        memory = f"{peak_memory() / 1e9:.2f} GB"
        self._progress.update(self._task, completed=done, note=text, memory=memory)


@contextmanager
def stage(title: str, total: float, quiet: bool = False) -> Iterator[Bar]:
    """A progress bar for a stage; it stays on screen when done."""
    progress = Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        Remaining(),
        TextColumn("{task.fields[memory]}"),
        TextColumn("{task.fields[note]}"),
        console=console(),
        disable=quiet,
    )
    with progress:
        yield Bar(progress, progress.add_task(title, total=total, note="", memory=""))
