"""Text that is cut in the middle where a terminal has no room for all of it: names differ at their ends."""

from collections.abc import Iterator

from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.text import Text

#: Characters that are left of a long text at least.
LEAST = 14


def shorten(text: str, width: int) -> str:
    """``text`` in at most ``width`` characters, the middle left out where it is longer.

    >>> shorten("model.layers.11.self_attn.q_proj", 20)
    'model.lay…ttn.q_proj'
    """
    if len(text) <= width:
        return text
    if width < 2:
        return "…"[:width]
    end = width // 2
    return f"{text[: width - 1 - end]}…{text[-end:]}"


class Shortened:
    """A piece of a table or a bar that is cut in the middle."""

    def __init__(self, text: str, justify: str = "left") -> None:
        self.text = text
        self.justify = justify

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """It may become short, but no shorter than a few characters."""
        return Measurement(min(LEAST, len(self.text)), len(self.text))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """As much as fits into a line."""
        shown = shorten(self.text, options.max_width)
        padding = options.max_width - len(shown) if self.justify == "right" else 0
        yield Text(" " * padding + shown, no_wrap=True, overflow="crop")
