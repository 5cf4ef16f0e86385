"""Checkpoint formats, one file each: the same compressed weights in several containers.

A format says which plans it can hold, turns one compressed weight into named tensors, reads them back,
and knows what the engine that serves it keeps in memory. :mod:`srcr.formats.checkpoint` does the rest
(files, shards, verification), the same for all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from srcr.errors import InputError, NotAvailableYetError
from srcr.models.topology import Topology
from srcr.types import CompressedWeight, CompressionPlan


@dataclass(frozen=True)
class Loaded:
    """Bytes that ``engine`` keeps in memory for the weights."""

    n_bytes: int
    engine: str


class Format(Protocol):
    """What a format's module defines."""

    def check(self, plan: CompressionPlan, topology: Topology) -> None:
        """Raise InputError if a checkpoint of this format cannot hold the plan."""
        ...

    def tensors(
        self, name: str, weight: CompressedWeight, dtype: torch.dtype, transposed: bool
    ) -> dict[str, Tensor]:
        """The tensors that stand for one linear, under their names in the file."""
        ...

    def quantization_config(
        self, plan: CompressionPlan, topology: Topology
    ) -> dict[str, Any] | None:
        """The ``quantization_config`` of config.json, or None."""
        ...

    def read(
        self,
        path: Path,
        names: list[str],
        transposed: frozenset[str],
        files: Sequence[Path] | None = None,
    ) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """(name, weight float32 [rows, cols], codes int8 or None) of each named linear in a folder, or in
        some files of it."""
        ...

    def loaded_bytes(self, path: Path) -> Loaded:
        """What the engine that serves this format keeps in memory."""
        ...


def get_format(name: str) -> Format:
    """The format called ``name``.

    Raises:
        InputError: unknown; NotAvailableYetError: known, but not built yet.
    """
    from srcr.formats import compressed_tensors, dense

    known: dict[str, Format] = {"compressed-tensors": compressed_tensors, "dense": dense}
    if name in ("gguf", "archive"):
        raise NotAvailableYetError(f"--format {name}")
    if name not in known:
        raise InputError(f"format {name!r} is not known: use {', '.join(known)}")
    return known[name]
