"""Packed embeddings: transformers initialises embeddings while it loads them, and ties weights, not codes, so
that a checkpoint of several schemes whose embedding is packed is no checkpoint to it."""

from pathlib import Path
from typing import Any

from torch import Tensor

from srcr.models.source import CheckpointSource
from srcr.models.streaming import empty_model
from srcr.storage.safetensors import TensorFiles

#: What a packed weight is stored as, by the names behind its module's.
PARTS = ("weight_packed", "weight_scale", "weight_shape")


def unpack_embedding(folder: Path, quantization: dict[str, Any]) -> dict[str, Tensor] | None:
    """The tensors of a compressed-tensors checkpoint with its packed input embedding as a plain weight, and
    ``quantization`` (its quantization_config) changed so that transformers leaves that alone; None where
    transformers can load the files as they are."""
    files = TensorFiles(folder)
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or len(groups) < 2 or not _any_packed(files):
        return None
    name = _input_embedding(folder)
    group = next((key for key, value in groups.items() if name in value.get("targets", ())), None)
    if group is None or f"{name}.weight_packed" not in files:
        return None
    tensors = {key: files.get(key) for key in files.entries}
    packed = {part: tensors.pop(f"{name}.{part}") for part in PARTS}
    tensors[f"{name}.weight"] = _unpack(packed, groups[group])
    groups[group] = {**groups[group], "targets": [t for t in groups[group]["targets"] if t != name]}
    if not groups[group]["targets"]:
        del groups[group]
    quantization["ignore"] = [*(quantization.get("ignore") or []), name]
    return tensors


def _any_packed(files: TensorFiles) -> bool:
    return any(name.endswith(f".{PARTS[0]}") for name in files.entries)


def _input_embedding(folder: Path) -> str:
    """The module name of a checkpoint's input embedding."""
    model = empty_model(CheckpointSource(folder))
    embedding = model.get_input_embeddings()
    return next(str(name) for name, module in model.named_modules() if module is embedding)


def _unpack(packed: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
    """The weight of packed tensors, as compressed-tensors computes it."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    weight: Tensor = compressor.decompress(packed, QuantizationScheme(**group))["weight"]
    return weight
