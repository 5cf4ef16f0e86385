"""What a checkpoint's ``config.json`` says, checked before anything believes it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from srcr.errors import InputError
from srcr.models.validation import check_counts, check_size, library_errors
from srcr.serialize import read_json
from srcr.storage.index import contents_instead
from srcr.storage.layout import CONFIG

ADAPTER = "adapter_config.json"


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` as written.

    Raises:
        InputError: missing or not a JSON object.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{folder} has no config.json: {contents_instead(folder)}")
    data = read_json(path)
    if not isinstance(data, dict):
        raise InputError(f"{path} is not a JSON object")
    return data


def quantization_of(folder: Path) -> dict[str, Any]:
    """What ``config.json`` says of how the weights are quantized; empty where it says nothing.

    Raises:
        InputError: it is no JSON object.
    """
    quantization = read_config(folder).get("quantization_config")
    if quantization is None:
        return {}
    if not isinstance(quantization, dict):
        raise InputError(
            f"the quantization_config in {folder / CONFIG} is of type {type(quantization).__name__}, not an "
            "object: mend it, or remove it where the weights are not quantized"
        )
    return quantization


def quant_method(folder: Path) -> object:
    """The tool or layout that ``config.json`` says the weights are quantized by; None where it says none."""
    return quantization_of(folder).get("quant_method")


def is_quantized(folder: Path) -> bool:
    """Whether ``config.json`` says that the weights are quantized."""
    return read_config(folder).get("quantization_config") is not None


def check_causal(folder: Path) -> None:
    """Refuse what is not a causal language model.

    Raises:
        InputError: names the architecture.
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
    if kind is None:
        raise InputError(
            f"the config.json of {folder} has no model_type: take that which belongs to the model's "
            "transformers version"
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

    if (folder / ADAPTER).exists():  # with peft installed transformers would apply it
        raise InputError(f"{folder} holds an adapter ({ADAPTER}): merge it into the weights first")
    check_causal(folder)
    data = read_config(folder)
    check_counts(folder / CONFIG, data)
    if "configuration_files" in data:
        raise InputError(
            f"{folder}: its config.json points to other configuration_files: remove them"
        )
    with library_errors(f"transformers cannot load {folder}"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config._attn_implementation = None  # might name a kernel of the hub
        config._experts_implementation = None
        if hasattr(config, "transformers_weights"):  # might name another file
            del config.transformers_weights
    check_size(folder, config, is_quantized(folder))
    return config


def config_of(data: Mapping[str, Any]) -> Any:
    """The transformers config that a config.json stands for.

    Raises:
        InputError: transformers refuses it.
    """
    from transformers import AutoConfig

    keys = _plain_floats({key: value for key, value in data.items() if key != "model_type"})
    with library_errors("transformers cannot read the config"):
        return AutoConfig.for_model(data["model_type"], **keys)


def _plain_floats(value: Any) -> Any:
    """A config with the numbers that JSON has no word for, which transformers writes as objects
    ({"__float__": "Infinity"})."""
    if isinstance(value, dict):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {key: _plain_floats(each) for key, each in value.items()}
    return [_plain_floats(each) for each in value] if isinstance(value, list) else value
