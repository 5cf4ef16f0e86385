"""A checkpoint written as a GGUF file: tensor by tensor, the experts of a layer in stacks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from srcr.formats.checkpoint import Checkpoint
from srcr.formats.gguf.architectures import (
    TensorNames,
    architecture_of,
    check_config,
    library,
    rope_tensors,
    write_metadata,
)
from srcr.formats.gguf.blocks import pack_blocks, type_of
from srcr.formats.gguf.vocabulary import chat_template, read_vocabulary, write_vocabulary
from srcr.formats.shards import write_config
from srcr.models.config import config_of
from srcr.numerics.tensors import dtype_name
from srcr.storage.layout import GGUF

#: What llama.cpp calls the kind of a file by most of its tensors.
FILE_TYPES = {
    "Q3_K": "MOSTLY_Q3_K_S", "Q4_0": "MOSTLY_Q4_0", "Q5_0": "MOSTLY_Q5_0", "Q6_K": "MOSTLY_Q6_K",
    "Q8_0": "MOSTLY_Q8_0",
}  # fmt: skip
PLAIN_FILE_TYPES = {
    torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16",
}  # fmt: skip


def write(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the file, config.json and the tokenizer into a folder."""
    gguf, config = library(), config_of(checkpoint.config)
    check_config(config)
    names, extra = TensorNames(config), rope_tensors(config)
    write_config(checkpoint, folder)
    vocabulary = read_vocabulary(folder, checkpoint.vocabulary)
    writer = gguf.GGUFWriter(folder / GGUF, architecture_of(config.model_type).name)
    write_metadata(writer, config)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType[_file_type(checkpoint)])
    write_vocabulary(writer, vocabulary, chat_template(folder))
    for name, tensor in extra.items():
        _declare(writer, name, _plain_form(tensor.shape, tensor.dtype))
    tensors = _tensors(checkpoint, names)
    for name, parameters in tensors.items():
        _declare(writer, name, _form(checkpoint, names, parameters))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for tensor in extra.values():
            writer.write_tensor_data(tensor.numpy())
        for parameters in tensors.values():
            writer.write_tensor_data(_array(checkpoint, names, parameters))
    finally:
        writer.close()


def _tensors(checkpoint: Checkpoint, names: TensorNames) -> Mapping[str, Sequence[str]]:
    """The parameters that lie in each tensor of llama.cpp, those of experts by their numbers; in the order of
    its names, blocks by their numbers."""

    def place(name: str) -> list[tuple[bool, int, str]]:
        return [
            (part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")
        ]

    tensors: dict[str, list[str]] = {}
    for name in [*checkpoint.plain_names(), *checkpoint.parameters]:
        tensors.setdefault(names.name(name), []).append(name)
    return {
        name: sorted(tensors[name], key=lambda parameter: names.expert(parameter) or 0)
        for name in sorted(tensors, key=place)
    }


@dataclass(frozen=True)
class _Form:
    """How numpy holds a tensor: its shape, its numbers, and ggml's type where those are its bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    kind: str | None = None


def _plain_form(shape: Sequence[int], dtype: torch.dtype) -> _Form:
    """The form of what is not quantized: bfloat16 by its bytes."""
    if dtype == torch.bfloat16:
        return _Form((*shape[:-1], 2 * shape[-1]), np.dtype("uint8"), "BF16")
    return _Form(tuple(shape), np.dtype(dtype_name(dtype)))


def _form(checkpoint: Checkpoint, names: TensorNames, parameters: Sequence[str]) -> _Form:
    """The form of what some parameters become."""
    name = parameters[0]
    linear, stack = _linear(checkpoint, name), _stack(names, parameters)
    if linear is None:
        meta = checkpoint.meta(name)
        return _plain_form((*stack, *meta.shape), _dtype(names, name, meta))
    rows, cols = checkpoint.contents.topology.shape(linear)
    scheme = checkpoint.contents.schemes.get(linear)
    if scheme is None:
        return _plain_form((*stack, rows, cols), checkpoint.dtype)
    kind = type_of(scheme)
    return _Form((*stack, rows, cols // kind.columns * kind.size), np.dtype("uint8"), kind.name)


def _stack(names: TensorNames, parameters: Sequence[str]) -> tuple[int, ...]:
    """The first dimension of the parameters of experts; empty for any other, which is alone."""
    if names.expert(parameters[0]) is not None:
        return (len(parameters),)
    (_,) = parameters
    return ()


def _linear(checkpoint: Checkpoint, parameter: str) -> str | None:
    """The compressed linear that a parameter is, if it is one."""
    return checkpoint.parameters[parameter][0] if parameter in checkpoint.parameters else None


def _declare(writer: Any, name: str, form: _Form) -> None:
    raw = None if form.kind is None else library().GGMLQuantizationType[form.kind]
    size = int(np.prod(form.shape)) * form.dtype.itemsize
    writer.add_tensor_info(name, list(form.shape), form.dtype, size, raw)


def _array(
    checkpoint: Checkpoint, names: TensorNames, parameters: Sequence[str]
) -> npt.NDArray[Any]:
    """The data of what some parameters become: where they are experts', one behind the other."""
    if not _stack(names, parameters):
        return _matrix(checkpoint, names, parameters[0])
    form = _form(checkpoint, names, parameters)
    stack = np.empty(form.shape, form.dtype)
    for place, parameter in zip(stack, parameters, strict=True):
        place[...] = _matrix(checkpoint, names, parameter)
    return stack


def _matrix(checkpoint: Checkpoint, names: TensorNames, name: str) -> npt.NDArray[Any]:
    """The data of a parameter as llama.cpp stores it."""
    linear, order, offset = _linear(checkpoint, name), names.row_order(name), names.offset(name)
    if linear is None:
        tensor = checkpoint.tensor(name)
        tensor = _ordered(tensor.to(_dtype(names, name, tensor)), order)
        return _bytes(tensor + offset if offset else tensor)
    weight = checkpoint.read(linear)
    if weight.codes is None:
        return _bytes(_ordered(weight.dequantize().to(checkpoint.dtype), order))
    return _ordered(torch.from_numpy(pack_blocks(weight, linear)), order).numpy()


def _dtype(names: TensorNames, name: str, tensor: Tensor) -> torch.dtype:
    """What a tensor is stored in where it is not quantized."""
    return torch.float32 if names.is_float32(name, tensor.ndim) else tensor.dtype


def _ordered(tensor: Tensor, order: Tensor | None) -> Tensor:
    return tensor if order is None else tensor[order]


def _bytes(tensor: Tensor) -> npt.NDArray[Any]:
    """A tensor as numpy holds it, bfloat16 by its bytes."""
    tensor = tensor.contiguous()
    return tensor.view(torch.uint8).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _file_type(checkpoint: Checkpoint) -> str:
    kinds = [type_of(scheme).name for scheme in checkpoint.contents.schemes.values()]
    if not kinds:
        return PLAIN_FILE_TYPES[checkpoint.dtype]
    return FILE_TYPES[max(sorted(set(kinds)), key=kinds.count)]
