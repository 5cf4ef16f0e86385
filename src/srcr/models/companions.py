"""The files of a checkpoint folder beside config and weights that belong to the model."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from srcr.errors import InputError
from srcr.models.config import read_config
from srcr.serialize import read_json, to_json
from srcr.storage.index import is_lfs_pointer

#: Tokenizers under every name that transformers gives their files.
TOKENIZER_PATTERNS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "bpe.codes",
    "*.model", "*.spm", "*.vocab", "*.tiktoken", "tekken.json", "dict.txt", "emoji.json", "normalizer.json",
    "byte_maps.json", "word_shape.json", "word_pronunciation.json", "entity_vocab.json",
    "target_vocab.json", "prophetnet.tokenizer",
)  # fmt: skip
#: Those, chat templates, processors, notices.
COMPANION_PATTERNS = (
    *TOKENIZER_PATTERNS,
    "chat_template*", "additional_chat_templates/*.jinja",
    "generation_config.json", "processor_config.json", "*preprocessor_config.json",
    "audio_tokenizer_config.json",
    "LICEN[CS]E*", "[Ll]icen[cs]e*", "NOTICE*", "[Nn]otice*", "COPYING*", "COPYRIGHT*", "*THIRD_PARTY*",
    "*USE_POLICY*", "PROHIBITED*",
)  # fmt: skip
#: All that is read of a folder besides its weights.
READ_PATTERNS = ("*.json", "*.jinja", "*.yaml", "*.py", "README.md", *COMPANION_PATTERNS)
#: Configs whose auto_map may name code.
_CODED = (
    "tokenizer_config.json", "processor_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip


def check_files(folder: Path) -> None:
    """Refuse a folder whose files, weights aside, are not what they seem: a link that leads out of it would
    be copied into the result. The hub's cache, whose snapshots are links to its blobs, is in order, and so
    are linked weights, of which nothing but tensors is ever read.

    Raises:
        InputError: such a link, what is no plain file (a pipe would be waited for without end), or a file
            that Git LFS has not fetched.
    """
    home = folder.resolve()
    for path in sorted({path for pattern in READ_PATTERNS for path in folder.glob(pattern)}):
        if path.is_dir():
            continue
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is no plain file: remove it")
        target = path.resolve()
        in_cache = target.parent.name == "blobs" and target.parts[-3].startswith("models--")
        if path.is_symlink() and not in_cache and not target.is_relative_to(home):
            raise InputError(
                f"{path} is a link that leads out of its folder, to {target}: only weights may be linked, "
                "copy the file itself"
            )
        if is_lfs_pointer(path):
            raise InputError(
                f"{path} is a Git LFS pointer, not the file: run `git lfs pull` in its folder"
            )


def copy_companions(source: Path, folder: Path) -> None:
    """Copy every file beside config and weights that belongs to the model in ``source``, the code that its
    configs name among them."""
    paths = [path for pattern in COMPANION_PATTERNS for path in source.glob(pattern)]
    paths += _code(source)
    for path in sorted(set(paths)):
        if path.is_file() and path.suffix != ".safetensors":
            target = folder / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    for name in _CODED:
        config = mapping_in(source / name)
        kept = with_code_that_is_there(config, source)
        if kept != config:
            (folder / name).write_text(to_json(kept), encoding="utf-8")


def with_code_that_is_there(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A config whose ``auto_map`` names only code that lies in ``folder`` or in a repository."""
    result = dict(config)
    classes = result.pop("auto_map", None)
    if isinstance(classes, dict):
        kept = {
            key: value
            for key, value in classes.items()
            if all(path is None or path.is_file() for path in _paths(value, folder))
        }
        result |= {"auto_map": kept} if kept else {}
    return result


def _paths(value: Any, folder: Path) -> Iterator[Path | None]:
    """The file of each class that an entry of an ``auto_map`` names; None: it is in a repository."""
    for name in value if isinstance(value, list) else [value]:
        if isinstance(name, str):
            module = name.rpartition(".")[0]
            yield None if "--" in name else folder / f"{module}.py"


def _code(folder: Path) -> list[Path]:
    """The Python files that the configs of a folder name, and those that they import from it."""
    from transformers.dynamic_module_utils import get_relative_import_files

    classes: list[Any] = []
    for config in [read_config(folder), *(mapping_in(folder / name) for name in _CODED)]:
        entries = config.get("auto_map")
        classes += entries.values() if isinstance(entries, dict) else []
    files: list[Path] = []
    for path in (path for value in classes for path in _paths(value, folder)):
        if path is not None and path.parent == folder and path.is_file():
            files += [path, *map(Path, get_relative_import_files(path))]
    return [path for path in files if path.parent == folder]


def mapping_in(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none."""
    try:
        data = read_json(path) if path.is_file() else {}
    except InputError:
        return {}  # who needs it says what is wrong with it
    return data if isinstance(data, dict) else {}
