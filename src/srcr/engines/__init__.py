"""Engines that run checkpoints, one file each, looked up by name: what ``srcr verify`` asks for logits.

To add one, drop a file into this folder (or another that is in ``srcr.engines.__path__``) that defines
``ENGINE``: an :class:`Engine`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch import Tensor

from srcr.environment import definitions
from srcr.errors import InputError, nearest


@dataclass(frozen=True)
class Engine:
    """A program that runs models. ``unavailable``: why it does not run here (None: it does); ``logits``:
    float32 [rows, len, vocabulary] that the checkpoint in a folder gives for token ids [rows, len];
    ``reads``: whether it loads a format, by name; ``tolerance``: how far its logits may be from those of
    transformers, relative in norm."""

    name: str
    unavailable: Callable[[], str | None]
    logits: Callable[[Path, Tensor], Tensor]
    reads: Callable[[str], bool]
    tolerance: float


def engines() -> dict[str, Engine]:
    """Every engine by name."""
    return _discover(tuple(__path__))


@cache
def _discover(path: tuple[str, ...]) -> dict[str, Engine]:
    """The engines of every file in the folders of ``path``, by name."""
    known = definitions(__name__, path, "ENGINE")
    return {engine.name: engine for engine in known if isinstance(engine, Engine)}


def get_engine(name: str) -> Engine:
    """The engine called ``name``.

    Raises:
        InputError: lists the names there are.
    """
    if name not in engines():
        raise InputError(f"engine {name!r} is not known: {nearest(name, engines())}")
    return engines()[name]
