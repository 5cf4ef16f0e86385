"""What is refused before a model is read: by names, files and settings alone."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from srcr.environment import parse_size, select_device
from srcr.errors import InputError
from srcr.models.checkpoint import ModelLike
from srcr.models.config import is_quantized
from srcr.models.load import resolve
from srcr.pipelines.options import Output, RunOptions
from srcr.storage.atomic import check_output
from srcr.storage.layout import RECORD


def check_run(options: RunOptions) -> None:
    """Refuse a device that is not here, and a memory budget that is no size.

    Raises:
        InputError: names the value.
    """
    select_device(options.device)
    if options.memory is not None:
        parse_size(options.memory)


def folder_of(model: ModelLike) -> Path | None:
    """The folder of a model that was named or opened from one; None of one in memory alone.

    Raises:
        InputError: as :func:`srcr.models.load.resolve`.
    """
    named = model[0] if isinstance(model, tuple) else model  # a pair with its tokenizer
    if isinstance(named, str | Path):
        return resolve(named)
    folder = getattr(named, "folder", None)
    return folder if isinstance(folder, Path) else None


def check_place(output: Output, model: ModelLike, options: RunOptions) -> None:
    """Refuse an output that cannot be written, before anything is downloaded.

    Raises:
        InputError: as :func:`check_run` and :func:`srcr.storage.atomic.check_output`.
    """
    check_run(options)
    if isinstance(model, str | Path) and not Path(model).expanduser().is_dir():
        check_output(output.folder, None, output.overwrite, output.resume)
    check_output(output.folder, folder_of(model), output.overwrite, output.resume)


def check_original(model: ModelLike, options: RunOptions) -> None:
    """Refuse to compress what is compressed already, unless the options allow it.

    Raises:
        InputError: says by what it was compressed.
    """
    folder = folder_of(model)
    if options.allow_requantize or folder is None or not _is_compressed(folder):
        return
    raise InputError(
        f"{folder} is compressed already ({_how(folder)}): compress the original, which loses less, or say "
        "--allow-requantize to compress its dequantized weights"
    )


def check_order(base: ModelLike, candidates: Sequence[ModelLike], command: str) -> None:
    """Refuse a compressed model in the place of its original, where the original stands in its own.

    Raises:
        InputError: says how ``command`` takes them.
    """
    first = folder_of(base)
    if first is None or not _is_compressed(first):
        return
    for candidate in candidates:
        folder = folder_of(candidate)
        if folder is not None and not _is_compressed(folder):
            raise InputError(
                f"{base} is compressed ({_how(first)}) and {candidate} is not: the original comes first, as "
                f"in {shlex.join(['srcr', command, str(candidate), str(base)])}"
            )


def _is_compressed(folder: Path) -> bool:
    return (folder / RECORD).is_file() or is_quantized(folder)


def _how(folder: Path) -> str:
    return (
        f"it holds {RECORD}" if (folder / RECORD).is_file() else "its config names a quantization"
    )
