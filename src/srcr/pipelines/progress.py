"""What people see while it runs: what is being done, how far it is, what is left, and memory; on stderr. A
terminal shows a bar; anything else (a log file) gets a line now and then."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining
from rich.table import Column

from srcr.environment import peak_memory
from srcr.pipelines.shortened import Shortened

#: Columns of a wide terminal, and of the bar on it; on others it is short, for the words beside it.
WIDE, LONG_BAR, SHORT_BAR = 100, 24, 8
#: Where stderr is no terminal, seconds between two lines: at least so many, and so much of what has passed.
SECONDS_BETWEEN, SHARE_BETWEEN = 10.0, 0.1


def console() -> Console:
    """Where people are spoken to: stderr, so that stdout stays for results."""
    return Console(stderr=True, highlight=False)


def say(note: str | None, quiet: bool = False) -> None:
    """Tell people something that they should know, if there is something."""
    if note and not quiet:
        console().print(f"note: {note}", soft_wrap=True)


def tell(text: str, quiet: bool) -> None:
    """Tell people where a run stands, unless it is quiet."""
    if not quiet:
        console().print(text)


class Bar(Protocol):
    """A stage of work. ``advance`` moves it; ``note`` says what is being done now."""

    def note(self, text: str, advance: float = 0) -> None:
        """Say what is being done, and move on."""
        ...

    def reach(self, done: float, text: str = "") -> None:
        """Say how much is done in all."""
        ...


class _TerminalBar:
    """A bar that moves."""

    def __init__(self, progress: Progress, title: str, total: float) -> None:
        self._progress = progress
        self._task = progress.add_task(title, total=total, note="", memory="")

    def note(self, text: str, advance: float = 0) -> None:
        """Say what is being done, and move on."""
        self._progress.update(self._task, note=text, memory=_memory(), advance=advance)

    def reach(self, done: float, text: str = "") -> None:
        """Say how much is done in all."""
        self._progress.update(self._task, completed=done, note=text, memory=_memory())


class _Lines:
    """A line now and then: the longer it takes, the fewer; and one at the end."""

    def __init__(self, title: str, total: float, tell: Callable[[str], None]) -> None:
        self._title, self._total, self._tell = title, total, tell
        self._done, self._text = 0.0, ""
        self._told_at = -1.0
        self._started = self._told = time.monotonic()

    def note(self, text: str, advance: float = 0) -> None:
        """Say what is being done, and move on."""
        self.reach(self._done + advance, text)

    def reach(self, done: float, text: str = "") -> None:
        """Say how much is done in all."""
        self._done, self._text = done, text
        now = time.monotonic()
        if now - self._told >= max(SECONDS_BETWEEN, SHARE_BETWEEN * (now - self._started)):
            self._told = now
            self.line()

    def end(self) -> None:
        """The last line, unless it was the last already."""
        if self._told_at != self._done or self._done < self._total:
            self.line()

    def line(self) -> None:
        """Where it stands."""
        self._told_at = self._done
        passed = time.monotonic() - self._started
        share = self._done / self._total if self._total else 1.0
        parts = [f"{self._title:<10} {100 * share:3.0f} %  {_clock(passed)}"]
        if 0 < share < 1:
            parts.append(f"left {_clock(passed * (1 - share) / share)}")
        self._tell("  ".join([*parts, _memory(), self._text]).rstrip())


class _Note(ProgressColumn):
    """What is being done, cut in the middle where there is no room: time and percent stay."""

    def render(self, task: Task) -> Shortened:
        """The note of a task."""
        return Shortened(str(task.fields["note"]))


@contextmanager
def stage(title: str, total: float, quiet: bool = False) -> Iterator[Bar]:
    """The progress of a stage; a bar stays on screen when it is done."""
    shown = console()
    with no_other_bars():
        if quiet or not shown.is_terminal:
            told = (lambda text: None) if quiet else _plain
            lines = _Lines(title, total, told)
            with nullcontext() if quiet else _compiling(_plain):
                yield lines
            lines.end()
            return
        long = shown.width >= WIDE
        fixed = Column(no_wrap=True)
        progress = Progress(
            TextColumn("{task.description:<10}", table_column=fixed.copy()),
            BarColumn(LONG_BAR if long else SHORT_BAR, table_column=fixed.copy()),
            TextColumn("{task.percentage:>3.0f} %", table_column=fixed.copy()),
            TimeElapsedColumn(table_column=fixed.copy()),
            TextColumn("left", table_column=fixed.copy()),
            Remaining(table_column=fixed.copy()),
            TextColumn("{task.fields[memory]}", table_column=fixed.copy()),
            _Note(table_column=Column(no_wrap=False, ratio=1)),
            console=shown,
            expand=True,
        )
        with progress, _compiling(_plain):
            yield _TerminalBar(progress, title, total)


def _plain(text: str) -> None:
    """A line on stderr, however long."""
    print(text, file=sys.stderr, flush=True)


def _memory() -> str:
    return f"{peak_memory() / 1e9:.2f} GB"


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


@contextmanager
def no_other_bars() -> Iterator[None]:
    """While srcr shows what it does, other libraries show no bars of tqdm."""
    from tqdm.std import tqdm

    begin = tqdm.__init__

    def silent(self: Any, *args: Any, **options: Any) -> None:
        begin(self, *args, **(options | {"disable": True}))

    tqdm.__init__ = silent
    try:
        yield
    finally:
        tqdm.__init__ = begin


@contextmanager
def _compiling(tell: Callable[[str], None]) -> Iterator[None]:
    """While kernels may be compiled: say so where they are, which takes a minute that nobody expects."""
    if "numba" not in sys.modules:  # whoever needs it has imported it before
        yield
        return
    from numba.core import event

    class _Listener(event.Listener):
        def on_start(self, event: Any) -> None:
            _say_compiling(tell)

        def on_end(self, event: Any) -> None:
            pass

    with event.install_listener("numba:compile", _Listener()):
        yield


@cache
def _say_compiling(tell: Callable[[str], None]) -> None:
    """Say it, once a process for each way of saying it."""
    tell("note: compiling kernels (once: later runs take them from the cache)")
