"""A name becomes a folder, and a folder a model: Hugging Face hub or local, safetensors only."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from srcr.errors import InputError, first_line, in_one_line
from srcr.models.guard import COMPANION_PATTERNS, check_counts, check_links, check_size, guest

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def resolve(model: str | Path) -> Path:
    """The local folder of ``model``: a folder, "bundled", or a hub id (downloaded to its cache).

    Raises:
        InputError: no such folder, and not a model the hub or its cache can give; a link in it that
            leads elsewhere.
    """
    folder = _find(model)
    check_links(folder)
    return folder


def _find(model: str | Path) -> Path:
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
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {in_one_line(error)}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} is not a JSON object")
    return data


def is_quantized(folder: Path) -> bool:
    """Whether ``config.json`` says that the weights are quantized."""
    return read_config(folder).get("quantization_config") is not None


def check_causal(folder: Path) -> None:
    """Refuse what is not a causal language model.

    Raises:
        InputError: names the architecture found.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = read_config(folder)
    causal: set[str] = set()
    for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        causal.update((names,) if isinstance(names, str) else names)
    architectures, kind = config.get("architectures") or [], config.get("model_type")
    if not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
        raise InputError(f"{folder}: the architectures of its config.json are no list of names")
    if architectures and not causal.intersection(architectures):
        raise InputError(
            f"{folder} is not a causal language model: its architecture is {', '.join(architectures)}"
        )
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise InputError(
            f"srcr cannot load {folder}: its model_type {kind!r} is unknown to the transformers installed "
            "here, and code that comes with a model is never run"
        )
    if not architectures and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(f"{folder} is not a causal language model: its model_type is {kind!r}")


def read_model_config(folder: Path) -> Any:
    """The configuration that transformers makes of ``config.json``, without what it says about code, kernels
    or other files to load.

    Raises:
        InputError: not a causal LM; transformers refuses it; it declares more than the weight files hold.
    """
    from transformers import AutoConfig

    check_causal(folder)
    data = read_config(folder)
    check_counts(folder / "config.json", data)
    if "configuration_files" in data:
        raise InputError(
            f"{folder}: its config.json points to other configuration_files: remove them"
        )
    with guest(f"transformers cannot load {folder}"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config._attn_implementation = None  # might name a kernel of the hub
        config._experts_implementation = None
        if hasattr(config, "transformers_weights"):  # might name another file
            del config.transformers_weights
    check_size(folder, config, is_quantized(folder))
    return config


def load_model(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The causal LM of ``folder`` on the CPU in evaluation mode, in its own precision (or ``dtype``).

    compressed-tensors checkpoints come back with plain, dequantized weights.

    Raises:
        InputError: not a causal LM, weights missing, damaged, or not safetensors.
        SrcrError: not enough memory.
    """
    from transformers import AutoModelForCausalLM

    config = read_model_config(folder)
    if (folder / "adapter_config.json").exists():  # with peft installed transformers would apply it
        raise InputError(
            f"{folder} holds an adapter (adapter_config.json): merge it into the weights first"
        )
    with guest(f"transformers cannot load {folder}"):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    if info["missing_keys"]:  # transformers makes them up at random
        missing = sorted(info["missing_keys"])
        raise InputError(
            f"{folder} lacks {len(missing)} weights of its architecture, {missing[0]} first: the "
            "checkpoint is damaged or belongs to another architecture"
        )
    model.eval()
    model.requires_grad_(False)
    with guest(f"the model of {folder} does not run"), torch.no_grad():
        if is_quantized(folder):  # compressed-tensors decompresses on the first forward pass
            model(torch.zeros(1, 2, dtype=torch.long), use_cache=False)
        return model if dtype is None else model.to(dtype)


def load(model: str | Path, dtype: torch.dtype | None = None) -> Any:
    """The causal LM called ``model`` (a folder, a hub id, or "bundled"), compressed or not.

    Raises:
        InputError: as :func:`resolve` and :func:`load_model`.
    """
    return load_model(resolve(model), dtype)


def load_tokenizer(folder: Path) -> Any | None:
    """The tokenizer of ``folder``, or None where there is none.

    Raises:
        InputError: transformers cannot load it.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model",
                                                     "tokenizer_config.json", "vocab.json")):  # fmt: skip
        return None
    with guest(f"transformers cannot load the tokenizer of {folder}"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def context_length(config: Any) -> int | None:
    """The longest sequence the model was made for, or None where its config sets no limit."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


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


def read_index(folder: Path) -> dict[str, str]:
    """The file of each tensor by the index of a sharded checkpoint.

    Raises:
        InputError: broken, or a file is missing or not in the folder.
    """
    index = folder / INDEX
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(name): file for name, file in found.items()}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else in_one_line(error)
        raise InputError(f"{index} is not a valid index: {reason}") from None
    if not names:
        raise InputError(f"{index} is not a valid index: its weight_map is empty")
    for name in names.values():
        if not isinstance(name, str) or "\0" in name:
            raise InputError(f"{index} is not a valid index: {name!r} is no file name")
        if Path(name).name != name:
            raise InputError(f"{index} points outside its folder: {name!r}")
        if not name.endswith(".safetensors"):
            raise InputError(f"{index} is not a valid index: {name!r} is no *.safetensors file")
        if not (folder / name).is_file():
            raise InputError(f"{index} names {name!r}, which is missing")
    return names


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
