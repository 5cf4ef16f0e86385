"""Which files hold a checkpoint's weights; names in an index stay in the folder."""

import json
from pathlib import Path

from srcr.errors import InputError, in_one_line

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sorted by name, as transformers looks for them:
    ``model.safetensors``, else those of its index, else all there are.

    Raises:
        InputError: there are none, or the index is broken or points outside the folder.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return [folder / name for name in sorted(set(read_index(folder).values()))]
    paths = [path for path in sorted(folder.glob("*.safetensors")) if path.is_file()]
    if not paths:
        raise InputError(
            f"{folder} has no *.safetensors weights; srcr reads no pickle files: convert the model "
            "with transformers' save_pretrained first"
        )
    return paths


def file_bytes(folder: Path) -> int:
    """Bytes of the weight files on disk."""
    return sum(path.stat().st_size for path in weight_files(folder))


def read_index(folder: Path) -> dict[str, str]:
    """The file of each tensor by the index of a sharded checkpoint.

    Raises:
        InputError: broken, or a file is missing or not in the folder.
    """
    index = folder / INDEX
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): file for name, file in weight_map.items()}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else in_one_line(error)
        raise InputError(f"{index} is not a valid index: {reason}") from None
    if not files:
        raise InputError(f"{index} is not a valid index: its weight_map is empty")
    for name in files.values():
        if not isinstance(name, str) or "\0" in name:
            raise InputError(f"{index} is not a valid index: {name!r} is no file name")
        if Path(name).name != name:
            raise InputError(f"{index} points outside its folder: {name!r}")
        if not name.endswith(".safetensors"):
            raise InputError(f"{index} is not a valid index: {name!r} is no *.safetensors file")
        if not (folder / name).is_file():
            raise InputError(f"{index} names {name!r}, which is missing")
    return files
