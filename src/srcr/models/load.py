"""A name becomes a folder, and a folder a model or a tokenizer: from the hub or local, safetensors only."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from srcr import bundled
from srcr.errors import InputError, first_line
from srcr.models.companions import (
    COMPANION_PATTERNS,
    TOKENIZER_PATTERNS,
    check_files,
    mapping_in,
)
from srcr.models.config import ADAPTER, is_quantized, read_model_config
from srcr.models.packed import unpack_embedding
from srcr.models.quantized import decompress, loading_errors, prepare_config
from srcr.models.validation import check_leftovers, library_errors
from srcr.storage.index import CONTAINERS, INDEX, SINGLE, containers
from srcr.storage.layout import CARD, CONFIG, PLAN, RECORD
from srcr.storage.safetensors import TensorFiles


def resolve(model: str | Path) -> Path:
    """The local folder of ``model``: a folder, "bundled", or a hub id (downloaded to its cache).

    Raises:
        InputError: no such folder, and not a model the hub or its cache can give; a link in it that
            leads elsewhere.
    """
    folder = _locate(model)
    check_files(folder)
    return folder


def _locate(model: str | Path) -> Path:
    name = str(model)
    if name == "bundled":
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

    others = [CONFIG, ADAPTER, INDEX, "*.py", *COMPANION_PATTERNS]
    # The card has the licence; the others are of what srcr compressed.
    others += [CARD, RECORD, PLAN]
    elsewhere = [f"*/{pattern}" for pattern in others if pattern.startswith("*")]
    try:
        folder = Path(snapshot_download(name, allow_patterns=others, ignore_patterns=elsewhere))
        return _download_weights(name, folder)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise InputError(
            f"model {name!r} is neither a folder here nor a model the hub gives ({reason})"
        ) from None


def _download_weights(name: str, folder: Path) -> Path:
    """The folder with the weight files that its index names; without an index with those of the root, where
    ``model.safetensors`` stands for all."""
    from huggingface_hub import snapshot_download

    def download(*patterns: str, ignored: Sequence[str] = ()) -> Path:
        return Path(
            snapshot_download(
                name,
                revision=folder.name,  # the commit: what was pushed meanwhile does not fit
                allow_patterns=list(patterns),
                ignore_patterns=list(ignored),
            )
        )

    index = mapping_in(folder / INDEX).get("weight_map")
    if isinstance(index, dict):
        names = {str(name) for name in index.values()}
        return download(*sorted(name for name in names if name.endswith(".safetensors")))
    if (download(SINGLE) / SINGLE).is_file():
        return folder
    if (folder / RECORD).is_file() and containers(download(*CONTAINERS)):
        return folder
    return download("*.safetensors", ignored=["*/*", "consolidated*"])


def load_model(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The causal LM of ``folder`` as transformers loads it, on the CPU in evaluation mode, in its own
    precision (or ``dtype``).

    Quantized checkpoints come back with plain, dequantized weights; modules that quantize their activations
    go on doing so.

    Raises:
        InputError: not a causal LM, weights missing, damaged, or not safetensors.
        SrcrError: not enough memory.
    """
    config = read_model_config(folder)
    prepare_config(folder, config)
    with loading_errors(folder, getattr(config, "quantization_config", None)):
        model, info = _pretrained(folder, config)
    if not is_quantized(folder):
        check_leftovers(folder, sorted(info["unexpected_keys"]), model.state_dict())
    if info["missing_keys"]:  # transformers makes them up at random
        missing = sorted(info["missing_keys"])
        raise InputError(
            f"{folder} lacks {len(missing)} weights of its architecture, {missing[0]} first: the "
            "checkpoint is damaged or belongs to another architecture"
        )
    model.eval()
    model.requires_grad_(False)
    with library_errors(f"the model of {folder} does not run"), torch.no_grad():
        if is_quantized(folder):
            decompress(model)
        return model if dtype is None else model.to(dtype)


def _pretrained(folder: Path, config: Any) -> tuple[Any, dict[str, Any]]:
    """The model of a folder, and what transformers says of its loading."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.auto_factory import _get_model_class

    options = {"config": config, "dtype": "auto", "output_loading_info": True}
    quantization = getattr(config, "quantization_config", None)
    state = unpack_embedding(folder, quantization) if isinstance(quantization, dict) else None
    if state is None and any((folder / name).is_file() for name in (SINGLE, INDEX)):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, local_files_only=True, **options
        )
    else:  # files of other names are not looked for
        if state is None:
            files = TensorFiles(folder)
            state = {name: files.get(name) for name in files.entries}
        kind = _get_model_class(config, AutoModelForCausalLM._model_mapping)
        model, info = kind.from_pretrained(None, state_dict=state, **options)
    return model, info


def load_tokenizer(folder: Path) -> Any | None:
    """The tokenizer of ``folder``, or None where there is none.

    Raises:
        InputError: transformers cannot load it.
    """
    from transformers import AutoTokenizer

    if not any(any(folder.glob(pattern)) for pattern in TOKENIZER_PATTERNS):
        return None
    with library_errors(f"transformers cannot load the tokenizer of {folder}"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
