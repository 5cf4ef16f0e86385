"""Which files hold a checkpoint's weights; names in an index stay in the folder."""

import json
from pathlib import Path

from srcr.errors import InputError, in_one_line
from srcr.storage.layout import ARCHIVE, GGUF

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
#: Files that hold weights, and are no safetensors.
CONTAINERS = (GGUF, ARCHIVE)
#: Safetensors files that are no transformers model: Mistral's and Meta's own format, adapters.
FOREIGN = ("consolidated", "adapter")
#: What a folder without a checkpoint may hold instead, by a file of it, and what to do.
_INSTEAD = (
    ("adapter_config.json", "an adapter: merge it into its base model first (merge_and_unload of peft)"),
    ("model_index.json", "a diffusers pipeline: srcr compresses language models"),
    ("modules.json", "a sentence-transformers model: srcr compresses causal language models"),
    ("*.gguf", "a GGUF file: give the original model, in safetensors"),
    ("*.srcrz", "an archive: unpack it with srcr export, or give the original model"),
    ("consolidated*", "the consolidated format: give the transformers version of the model, or convert it"),
    ("*.bin", "pickle files (*.bin), which srcr does not read: convert them with save_pretrained"),
    ("*.pt*", "pickle files (*.pt, *.pth), which srcr does not read: convert them with save_pretrained"),
    ("*.h5", "TensorFlow weights: give the model in safetensors"),
    ("*.msgpack", "Flax weights: give the model in safetensors"),
    ("*.onnx", "an ONNX file: give the original model, in safetensors"),
    ("onnx/*.onnx", "ONNX files: give the original model, in safetensors"),
)  # fmt: skip
#: How the text begins that Git leaves where a large file was not fetched (Git LFS specification, version 1).
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what Git leaves where it has not fetched a large one."""
    try:
        with path.open("rb") as stream:
            return stream.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False  # whoever needs it says what is wrong with it


def contents_instead(folder: Path) -> str:
    """What ``folder`` holds where a checkpoint was expected, and what to do about it."""
    if not any(folder.iterdir()):
        return "the folder is empty: give the folder that holds the model's config.json and weights"
    for pattern, what in _INSTEAD:
        if any(folder.glob(pattern)):
            return f"it holds {what}"
    return "give the folder of a Hugging Face model, in safetensors"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sorted by name, as transformers looks for them:
    ``model.safetensors``, else those of its index; else all there are but :data:`FOREIGN` ones.

    Raises:
        InputError: there are none, or the index is broken or points outside the folder.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return [folder / name for name in sorted(set(read_index(folder).values()))]
    paths = [
        path
        for path in sorted(folder.glob("*.safetensors"))
        if path.is_file() and not path.name.startswith(FOREIGN)
    ]
    if not paths:
        raise InputError(f"{folder} has no *.safetensors weights: {contents_instead(folder)}")
    return paths


def stored_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights, be it in a single file of another kind.

    Raises:
        InputError: as :func:`weight_files`.
    """
    return containers(folder) or weight_files(folder)


def containers(folder: Path) -> list[Path]:
    """The files in a folder that hold its weights, and are no safetensors; none where a model in safetensors
    lies beside them."""
    there = [folder / name for name in CONTAINERS if (folder / name).is_file()]
    model = any((folder / name).is_file() for name in (SINGLE, INDEX))
    return [] if model else there


def file_bytes(folder: Path) -> int:
    """Bytes of the weight files on disk."""
    return sum(path.stat().st_size for path in stored_files(folder))


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
