"""Checkpoints whose weights another tool has quantized: what transformers makes of them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from srcr.errors import InputError
from srcr.models.validation import library_errors

COMPRESSED_TENSORS, PACKED = "compressed-tensors", "pack-quantized"
#: Methods whose kernels want a GPU, and whose weights transformers dequantizes instead where it is told to.
DEQUANTIZED = ("fp8", "mxfp4", "mxfp8")
#: What to do about a checkpoint that cannot be loaded.
REMEDY = "srcr works on the original, unquantized model: give that"


def prepare_config(folder: Path, config: Any) -> None:
    """Change the transformers ``config`` of a quantized checkpoint so that its weights can be loaded on a
    CPU: dequantized where they cannot be kept as they are. The files of ``folder`` stay as they are.

    Raises:
        InputError: transformers does not know the method, or would dequantize by the wrong scheme.
    """
    quantization = getattr(config, "quantization_config", None)
    if not isinstance(quantization, dict):
        return
    from transformers.quantizers.auto import AutoHfQuantizer

    with loading_errors(folder, quantization):
        known = AutoHfQuantizer.supports_quant_method(quantization)
    if not known:
        raise InputError(
            f"{folder} is quantized by {method(quantization)}, which the transformers installed here does "
            f"not know: {REMEDY}"
        )
    schemes = _weight_schemes(quantization)
    if any(packed and scheme.get("symmetric") is False for scheme, packed in schemes):
        if any(scheme != schemes[0] for scheme in schemes):
            raise InputError(
                f"{folder} is quantized with zero-points and by several schemes, of which transformers "
                f"applies only the first: {REMEDY}"
            )
        quantization["dequantize"] = True  # transformers cannot keep packed zero-points
    if quantization.get("quant_method") in DEQUANTIZED:
        quantization["dequantize"] = True


def method(quantization: Mapping[str, Any]) -> str:
    """How a ``quantization_config`` names what quantized the weights."""
    name = quantization.get("quant_method")
    return repr(name) if name else "an unnamed method"


def _weight_schemes(quantization: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], bool]]:
    """How each config group of a compressed-tensors checkpoint stores its weights, and whether packed."""
    if quantization.get("quant_method") != COMPRESSED_TENSORS:
        return []
    groups = quantization.get("config_groups")
    groups = groups.values() if isinstance(groups, dict) else []
    return [
        (group["weights"], (group.get("format") or quantization.get("format")) == PACKED)
        for group in groups
        if isinstance(group, dict) and isinstance(group.get("weights"), dict)
    ]


@contextmanager
def loading_errors(folder: Path, quantization: Mapping[str, Any] | None) -> Iterator[None]:
    """While transformers loads ``folder``: its errors in one line, with the method where it is quantized.

    Raises:
        InputError: it failed; SrcrError: there was not enough memory.
    """
    what = f"transformers cannot load {folder}"
    if quantization is not None:
        what += f", quantized by {method(quantization)}, here ({REMEDY})"
    with library_errors(what):
        yield


def decompress(model: Any) -> None:
    """Make plain modules of a quantized model's: compressed-tensors decompresses on the first forward pass,
    and keeps weights in caches that write through to all that share them. What quantizes activations stays,
    as the engine that serves the model has it."""
    model(torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    if any(type(module._parameters) is not dict for module in model.modules()):
        from compressed_tensors.offload import remove_dispatch

        remove_dispatch(model)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        for name in set(module._parameters) - {"weight", "bias"}:
            if name.startswith("weight_") or not _quantizes_activations(scheme):
                delattr(module, name)  # what its weight was unpacked from
        if not _quantizes_activations(scheme):
            del module.quantization_scheme


def strip_quantizers(model: Any) -> Any:
    """The model itself, whose modules no longer quantize their activations: its weights alone."""
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            for name in set(module._parameters) - {"weight", "bias"}:
                delattr(module, name)
            del module.quantization_scheme
    return model


def _quantizes_activations(scheme: Any) -> bool:
    return scheme.input_activations is not None or scheme.output_activations is not None
