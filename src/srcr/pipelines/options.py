"""How a run goes, and where its result goes, whatever it does."""

from dataclasses import dataclass
from pathlib import Path

from srcr.errors import InputError


@dataclass(frozen=True)
class RunOptions:
    """``seed`` None: the plan's own, or 0; ``device``: auto, cpu, cuda or cuda:0; ``memory``: a budget such
    as "4GB" (None: half of what is free), on which no result depends; ``quiet``: no progress on stderr;
    ``command``: what the record says that the run was made with; ``cache``: whether text that the model
    writes is kept in, and taken from, the user's cache folder; ``allow_requantize``: whether a model may be
    compressed that is compressed already.

    >>> RunOptions(seed=1, memory="4GB").device
    'auto'
    """

    seed: int | None = None
    device: str = "auto"
    memory: str | None = None
    quiet: bool = False
    command: str = ""
    cache: bool = True
    allow_requantize: bool = False


@dataclass(frozen=True)
class Output:
    """Where the result goes. ``format`` None: compressed-tensors where it can hold the plan, else
    dense, said aloud. ``overwrite`` replaces an earlier result; ``resume`` continues a killed run of the
    same settings.

    >>> Output("small", format="dense").resume
    False
    """

    path: str | Path
    format: str | None = None
    overwrite: bool = False
    resume: bool = False

    @classmethod
    def of(cls, output: "Output | str | Path") -> "Output":
        """An output as it is; a path with the defaults."""
        if isinstance(output, Output):
            return output
        if not isinstance(output, str | Path):
            raise InputError(
                f"an output of type {type(output).__name__} is not known: give a path or an Output; of "
                "compress it is the second argument, the plan the third"
            )
        return cls(output)

    @property
    def folder(self) -> Path:
        """``path`` as a Path."""
        return Path(self.path)
