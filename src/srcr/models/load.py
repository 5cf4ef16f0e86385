"""A name becomes a folder, and a folder a model: Hugging Face hub or local, safetensors only."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from srcr.errors import InputError, first_line

INDEX = "model.safetensors.index.json"
#: Files of a checkpoint folder that are not weights and travel with the model.
COMPANION_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "generation_config.json",
    "preprocessor_config.json",
    "LICENSE*",
)


def resolve(model: str | Path) -> Path:
    """The local folder of ``model``: a folder, "bundled", or a hub id (downloaded to its cache).

    Raises:
        InputError: no such folder, and not a model the hub or its cache can give.
    """
    name = str(model)
    if name == "bundled":
        from srcr import bundled

        return bundled.model_path()
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"model {name!r} is a file: give the folder that holds its config.json")
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise InputError(
            f"model folder {name!r} does not exist: give a folder with config.json, a hub id "
            "such as org/name, or 'bundled'"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json", *COMPANION_PATTERNS]
    patterns += ["srcr.json", "plan.yaml"]  # of a model that srcr compressed
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise InputError(
            f"model {name!r} is neither a folder here nor a model the hub gives ({reason})"
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` as written.

    Raises:
        InputError: missing or not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} has no config.json: it is not a Hugging Face model folder")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} is not a JSON object")
    return data


def check_causal(folder: Path) -> None:
    """Refuse what is not a causal language model.

    Raises:
        InputError: names the architecture found.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = read_config(folder)
    causal: set[str] = set()
    for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        causal.update((names,) if isinstance(names, str) else names)
    architectures = config.get("architectures") or []
    if architectures and not causal.intersection(architectures):
        raise InputError(
            f"{folder} is not a causal language model: its architecture is "
            f"{', '.join(map(str, architectures))}"
        )
    kind = config.get("model_type")
    if not architectures and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(f"{folder} is not a causal language model: its model_type is {kind!r}")


def load_model(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The causal LM of ``folder`` on the CPU in evaluation mode, in its own precision (or ``dtype``).

    compressed-tensors checkpoints come back with plain, dequantized weights.

    Raises:
        InputError: not a causal LM, weights missing, damaged, or not safetensors.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from srcr.formats.safetensors_files import TensorFiles

    check_causal(folder)
    quantized = "quantization_config" in read_config(folder)
    if not list(folder.glob("*.safetensors")):
        raise InputError(
            f"{folder} has no *.safetensors weights; srcr reads no pickle files: convert the model "
            "with transformers' save_pretrained first"
        )
    with TensorFiles(folder):  # whole, and inside the folder: transformers does not look
        pass
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (
        OSError, ValueError, KeyError, RuntimeError, SafetensorError, TypeError, ImportError,
        StrictDataclassError,
    ) as error:  # fmt: skip
        raise InputError(f"transformers cannot load {folder}: {error}") from error
    if info["missing_keys"]:  # transformers makes them up at random
        missing = sorted(info["missing_keys"])
        raise InputError(
            f"{folder} lacks {len(missing)} weights of its architecture, {missing[0]} first: the "
            "checkpoint is damaged or belongs to another architecture"
        )
    model.eval()
    model.requires_grad_(False)
    if quantized:  # compressed-tensors decompresses on the first forward pass
        with torch.no_grad():
            model(torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    return model if dtype is None else model.to(dtype)


def load(model: str | Path, dtype: torch.dtype | None = None) -> Any:
    """The causal LM called ``model`` (a folder, a hub id, or "bundled"), compressed or not.

    Raises:
        InputError: as :func:`resolve` and :func:`load_model`.
    """
    return load_model(resolve(model), dtype)


def load_tokenizer(folder: Path) -> Any | None:
    """The tokenizer of ``folder``, or None where there is none."""
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model",
                                                     "tokenizer_config.json", "vocab.json")):  # fmt: skip
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise InputError(f"transformers cannot load the tokenizer of {folder}: {error}") from error


def context_length(config: Any) -> int | None:
    """The longest sequence the model was made for, or None where its config sets no limit."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sorted by name: those of its index, else
    ``model.safetensors``, else all there are.

    Raises:
        InputError: there are none, or the index is broken or points outside the folder.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index} is not a valid index: {error}") from None
        for name in names:
            if not isinstance(name, str):
                raise InputError(f"{index} is not a valid index: {name!r} is no file name")
            if Path(name).name != name:
                raise InputError(f"{index} points outside its folder: {name!r}")
            if not (folder / name).is_file():
                raise InputError(f"{index} names {name!r}, which is missing")
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    paths = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not paths:
        raise InputError(f"{folder} has no *.safetensors weights")
    return paths


def sha256(paths: list[Path]) -> str:
    """One hash over the bytes of several files, in order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def output_head(model: nn.Module) -> str | None:
    """The module name of the output embedding, whatever the architecture calls it."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return next((name for name, module in model.named_modules() if module is head), None)
