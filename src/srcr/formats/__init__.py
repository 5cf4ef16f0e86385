"""Checkpoint formats, one file each, looked up by name: the same compressed weights in several containers.

To add one, drop a file into this folder (or another that is in ``srcr.formats.__path__``) that defines
``FORMAT``: a :class:`Format`, which writes a :class:`~srcr.formats.checkpoint.Checkpoint` and reads it back.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srcr.environment import definitions
from srcr.errors import InputError, nearest
from srcr.formats.checkpoint import Checkpoint, Contents, Scheme
from srcr.models.checkpoint import OpenModel
from srcr.models.config import quant_method
from srcr.models.load import load_model, resolve
from srcr.models.matrices import MatrixRef
from srcr.plans.plan import CompressionPlan
from srcr.plans.resolve import (
    AUTO_GROUPS,
    resolve_group_sizes,
    resolve_scale_bits,
    resolve_scale_dtype,
)
from srcr.plans.specs import ScaleDtype
from srcr.records.run import LoadedBytes, Loader

#: ``(matrix, its shape [rows, cols], its scheme or None, dtype)`` -> the tensors that it is stored as, by
#: their full names, without data.
Layout = Callable[[MatrixRef, tuple[int, int], Scheme | None, torch.dtype], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Format:
    """How checkpoints are stored.

    ``check`` raises InputError where the contents do not fit; ``write`` puts a checkpoint into an empty
    folder, ``read`` gives it back; ``recognises``: whether a folder holds this format; ``layout``: what a
    compressed linear is stored as; ``loaded_bytes``: what the engine that serves a folder of such contents
    keeps in memory; ``load``: the model in it, dequantized, on the CPU, in a precision (None: its own);
    ``notes``: what should be said aloud of contents that it holds, such as which engines do not load them;
    ``loader``: which library opens them as a transformers model; ``group_sizes`` stand for "auto", the first
    that divides a width, ``super_blocks`` before those where 256 divides it: the group size and the bits of
    scales in units of their super-blocks, by the bits of a code; ``scale_dtype``: what it stores the scales
    of a model of a precision in (None: in that); ``any_scale_dtype``: whether it stores them in any other
    that a plan names; ``tolerance``: how far plain tensors may read back from what was written, relative to 1
    and themselves; ``check_model`` raises InputError for a model that it cannot hold, whatever is done to it.
    """

    name: str
    summary: str
    check: Callable[[Contents], None]
    write: Callable[[Checkpoint, Path], None]
    read: Callable[[Path], Checkpoint]
    recognises: Callable[[Path], bool]
    layout: Layout
    loaded_bytes: Callable[[Path, Contents], LoadedBytes]
    load: Callable[[Path, torch.dtype | None], Any] = load_model
    notes: Callable[[Contents], Sequence[str]] = lambda contents: ()
    loader: Callable[[Contents], Loader] = lambda contents: "transformers"
    group_sizes: tuple[int, ...] = AUTO_GROUPS
    super_blocks: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    scale_dtype: Callable[[torch.dtype], ScaleDtype | None] = lambda dtype: None
    any_scale_dtype: bool = False
    tolerance: float = 0.0
    check_model: Callable[[OpenModel], None] = lambda opened: None


@cache
def _discover(path: tuple[str, ...]) -> dict[str, Format]:
    """The formats of every file in the folders of ``path``, by name."""
    known = definitions(__name__, path, "FORMAT")
    return {fmt.name: fmt for fmt in known if isinstance(fmt, Format)}


def formats() -> dict[str, Format]:
    """Every format by name."""
    return _discover(tuple(__path__))


def get_format(name: str) -> Format:
    """The format called ``name``.

    Raises:
        InputError: lists the names there are.
    """
    if name in formats():
        return formats()[name]
    raise InputError(f"format {name!r} is not known: {nearest(name, formats())}")


def resolve_for(
    fmt: Format, plan: CompressionPlan, opened: OpenModel
) -> tuple[CompressionPlan, str | None]:
    """The plan with the group sizes and scales that a format has for a model, where it says nothing of them;
    and a note on its group sizes."""
    shapes, tables = opened.topology.shapes, opened.topology.embedding_shapes
    plan = resolve_scale_bits(plan, shapes, tables, fmt.super_blocks)
    common_widths = opened.topology.common_widths
    plan, note = resolve_group_sizes(plan, shapes, tables, fmt.group_sizes, common_widths)
    return resolve_scale_dtype(plan, fmt.scale_dtype(opened.dtype)), note


def recognised(folder: Path) -> Format | None:
    """The format of the checkpoint in a folder; None where srcr does not read it."""
    return next((fmt for fmt in formats().values() if fmt.recognises(folder)), None)


def detect(folder: Path) -> Format:
    """The format of the checkpoint in a folder.

    Raises:
        InputError: it is none that srcr reads.
    """
    if (fmt := recognised(folder)) is not None:
        return fmt
    raise InputError(
        f"{folder} is quantized by {quant_method(folder)!r}, which srcr does not read: it reads "
        f"{', '.join(formats())} checkpoints"
    )


def load(path: str | Path, dtype: torch.dtype | None = None) -> Any:
    """The causal LM in ``path`` (a folder in any format, a hub id, or "bundled"), dequantized, on the CPU in
    evaluation mode, in its own precision or ``dtype``.

    Raises:
        InputError: it cannot be loaded.

    >>> load("bundled").config.model_type
    'llama'
    """
    folder = resolve(path)
    fmt = recognised(folder)
    # What another tool has quantized, transformers may know how to load.
    return load_model(folder, dtype) if fmt is None else fmt.load(folder, dtype)
