"""``gguf``: one file that llama.cpp runs, codes as they are.

With scales for groups of 32 columns (or of a multiple) codes become blocks of Q4_0, Q5_0 and Q8_0; with
scales in units of super-blocks of 256 columns, those of Q3_K and Q6_K. Nothing is rounded again. Everything
else stays in the model's own precision, norms in float32. The folder holds config.json and tokenizer as
well, so that srcr reads it back.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from srcr.errors import InputError
from srcr.formats import Format
from srcr.formats.checkpoint import Checkpoint, Contents, Scheme, dequantizing
from srcr.formats.gguf.architectures import (
    TensorNames,
    architecture_of,
    check_config,
    rope_tensors,
    write_metadata,
)
from srcr.formats.gguf.blocks import (
    BLOCK,
    BY_NAME,
    SUPER_BLOCKS,
    BlockType,
    block_type,
    pack_blocks,
    unpack_blocks,
)
from srcr.formats.gguf.source import OFFSET_ERROR, GgufFile, GgufSource
from srcr.formats.gguf.vocabulary import chat_template, read_vocabulary, write_vocabulary
from srcr.formats.shards import write_config
from srcr.models.checkpoint import OpenModel
from srcr.models.config import config_of
from srcr.models.matrices import MatrixRef
from srcr.numerics.compressed import CompressedWeight
from srcr.numerics.tensors import dtype_name
from srcr.records.run import LoadedBytes
from srcr.storage.index import containers
from srcr.storage.layout import GGUF

#: What llama.cpp calls the kind of a file by most of its tensors.
FILE_TYPES = {
    "Q3_K": "MOSTLY_Q3_K_S", "Q4_0": "MOSTLY_Q4_0", "Q5_0": "MOSTLY_Q5_0", "Q6_K": "MOSTLY_Q6_K",
    "Q8_0": "MOSTLY_Q8_0",
}  # fmt: skip
PLAIN_FILE_TYPES = {
    torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16",
}  # fmt: skip


def check(contents: Contents) -> None:
    """Refuse what llama.cpp, or blocks of 32, cannot hold.

    Raises:
        InputError: the architecture; zero-points; a width or a group size that 32 does not divide.
    """
    _library()
    check_config(contents.config)
    for name, scheme in contents.schemes.items():
        if not scheme.symmetric:
            raise InputError(
                f"gguf keeps a pruned weight exactly 0 with grids around 0 only, and {name} has zero-points: "
                "use --symmetric"
            )
        if scheme.scale_bits is not None:
            _check_super_blocks(name, scheme)
            continue
        width = contents.topology.shape(name)[1]
        if width % BLOCK:
            names = [n for n in contents.schemes if contents.topology.shape(n)[1] % BLOCK]
            raise InputError(
                f"gguf stores codes in blocks of {BLOCK} columns, which do not divide the {width} of {name}"
                f"{f' and {len(names) - 1} more' if len(names) > 1 else ''}: leave them alone (--ignore), or "
                "use --format compressed-tensors"
            )
        if scheme.group_size != -1 and scheme.group_size % BLOCK:
            raise InputError(
                f"gguf stores a scale for {BLOCK} columns, and {name} has groups of {scheme.group_size}: use "
                f"--group-size {BLOCK}"
            )


def _check_super_blocks(name: str, scheme: Scheme) -> None:
    """Refuse scales in units of super-blocks that no type has.

    Raises:
        InputError: names what there is.
    """
    kind = block_type(scheme.num_bits, scheme.scale_bits)
    if kind is None or kind.group_size != scheme.group_size:
        raise InputError(
            f"gguf has super-blocks of codes of at most 3 bits with scales of 6, and of at most 6 bits with "
            f"scales of 8, in groups of 16; {name} has {scheme.num_bits} bits, scale_bits "
            f"{scheme.scale_bits} and group_size {scheme.group_size}: leave the last two out of the plan"
        )


def notes(contents: Contents) -> list[str]:
    """Where the format takes more bytes than the codes need."""
    result = []
    kinds = {(s.num_bits, _kind(s).name) for s in contents.schemes.values()}
    narrow = sorted((bits, name) for bits, name in kinds if BY_NAME[name].num_bits != bits)
    if narrow:
        bits = " and ".join(str(each) for each, _ in narrow)
        names = " and ".join(name for _, name in narrow)
        result.append(
            f"codes of {bits} bits are stored as {names}, which takes more: --format archive packs them"
        )
    if contents.config.model_type == "mistral" and contents.config.sliding_window is not None:
        result.append(
            "llama.cpp has no sliding window for Mistral: it computes what transformers does for texts of at "
            f"most {contents.config.sliding_window} tokens"
        )
    if contents.topology.embedding not in contents.schemes:
        result.append(
            "the embedding stays in the model's precision: --embeddings 8 halves it (Q8_0)"
        )
    return result


def _check_model(opened: OpenModel) -> None:
    """Refuse a model whose tensors or tokenizer llama.cpp has no place for.

    Raises:
        InputError: names it.
    """
    names = TensorNames(opened.config)
    for name in opened.blockwise.names():
        names.name(name)
    if opened.folder is not None:
        read_vocabulary(opened.folder, opened.vocabulary)


def _kind(scheme: Scheme) -> BlockType:
    """The type of what a scheme's codes are stored in."""
    kind = block_type(scheme.num_bits, scheme.scale_bits)
    assert kind is not None, "checked before"
    return kind


def _layout(
    ref: MatrixRef, shape: tuple[int, int], scheme: Scheme | None, dtype: torch.dtype
) -> Mapping[str, Tensor]:
    """Blocks, as bytes; a plain weight without a scheme."""
    rows, cols = shape
    if scheme is None:
        return {ref.parameter: torch.empty(rows, cols, dtype=dtype, device="meta")}
    size = cols // _kind(scheme).columns * _kind(scheme).size
    return {ref.parameter: torch.empty(rows, size, dtype=torch.uint8, device="meta")}


def _write(checkpoint: Checkpoint, folder: Path) -> None:
    gguf = _library()
    config = config_of(checkpoint.config)
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
        _add(writer, gguf, name, tensor.shape, tensor.dtype)
    parameters = _parameters(checkpoint, names)
    for name in parameters:
        _declare(writer, gguf, checkpoint, names, name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for tensor in extra.values():
            writer.write_tensor_data(tensor.numpy())
        for name in parameters:
            writer.write_tensor_data(_array(checkpoint, names, name))
    finally:
        writer.close()


def _parameters(checkpoint: Checkpoint, names: TensorNames) -> list[str]:
    """Every parameter, in the order of llama.cpp's names: blocks by their numbers."""

    def place(name: str) -> list[tuple[bool, int, str]]:
        parts = names.name(name).split(".")
        return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]

    return sorted([*checkpoint.plain_names(), *checkpoint.parameters], key=place)


def _linear(checkpoint: Checkpoint, parameter: str) -> str | None:
    """The compressed linear that a parameter is, if it is one."""
    return checkpoint.parameters[parameter][0] if parameter in checkpoint.parameters else None


def _declare(writer: Any, gguf: Any, checkpoint: Checkpoint, names: TensorNames, name: str) -> None:
    linear = _linear(checkpoint, name)
    if linear is None:
        meta = checkpoint.meta(name)
        _add(writer, gguf, names.name(name), meta.shape, _plain_dtype(meta))
        return
    contents = checkpoint.contents
    scheme = contents.schemes.get(linear)
    layout = _layout(
        contents.topology.matrix(linear), contents.topology.shape(linear), scheme, checkpoint.dtype
    )
    kind = None if scheme is None else _kind(scheme).name
    _add(writer, gguf, names.name(name), layout[name].shape, layout[name].dtype, kind)


def _array(checkpoint: Checkpoint, names: TensorNames, name: str) -> npt.NDArray[Any]:
    """The data of a parameter as llama.cpp stores it."""
    linear, order, offset = _linear(checkpoint, name), names.row_order(name), names.offset(name)
    if linear is None:
        tensor = checkpoint.tensor(name)
        tensor = _ordered(tensor.to(_plain_dtype(tensor)), order)
        return _bytes(tensor + offset if offset else tensor)
    weight = checkpoint.read(linear)
    if weight.codes is None:
        return _bytes(_ordered(weight.dequantize().to(checkpoint.dtype), order))
    return _ordered(torch.from_numpy(pack_blocks(weight, linear)), order).numpy()


def _ordered(tensor: Tensor, order: Tensor | None) -> Tensor:
    return tensor if order is None else tensor[order]


def _bytes(tensor: Tensor) -> npt.NDArray[Any]:
    """A tensor as numpy holds it, bfloat16 by its bytes."""
    tensor = tensor.contiguous()
    return tensor.view(torch.uint8).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _plain_dtype(tensor: Tensor) -> torch.dtype:
    """llama.cpp wants norms and biases in float32."""
    return torch.float32 if tensor.ndim == 1 else tensor.dtype


def _add(
    writer: Any,
    gguf: Any,
    name: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    kind: str | None = None,
) -> None:
    """Declare a tensor: a type of blocks by its ``kind``, or plain."""
    if kind is None and dtype == torch.bfloat16:
        kind, shape, dtype = "BF16", [*shape[:-1], 2 * shape[-1]], torch.uint8
    raw = None if kind is None else gguf.GGMLQuantizationType[kind]
    size = int(np.prod(shape)) * dtype.itemsize
    numpy_dtype = np.dtype(dtype_name(dtype))
    writer.add_tensor_info(name, list(shape), numpy_dtype, size, raw)


def _file_type(checkpoint: Checkpoint) -> str:
    kinds = [_kind(scheme).name for scheme in checkpoint.contents.schemes.values()]
    if not kinds:
        return PLAIN_FILE_TYPES[checkpoint.dtype]
    return FILE_TYPES[max(sorted(set(kinds)), key=kinds.count)]


def _read(folder: Path) -> Checkpoint:
    """The checkpoint: codes as stored, in the widths of their blocks, with a scale for each block."""
    _library()
    file = GgufFile(folder / GGUF)
    source = GgufSource(folder, file)
    opened = OpenModel(str(folder), source, folder)
    topology = opened.topology
    schemes = {}
    for name in [*topology.linears(), *topology.embeddings]:
        parameter = topology.matrix(name).parameter
        if parameter in source.present:
            kind = BY_NAME.get(file.kind(source.stored.name(parameter)))
            if kind is not None:
                schemes[name] = Scheme(kind.num_bits, kind.group_size, True, kind.scale_bits)
    contents = Contents(topology, opened.config, schemes, tuple(schemes))
    return Checkpoint.of(opened, contents, partial(_decode, source, contents))


def _decode(source: GgufSource, contents: Contents, name: str) -> CompressedWeight:
    parameter = contents.topology.matrix(name).parameter
    stored = source.stored.name(parameter)
    weight = unpack_blocks(source.file.data(stored), BY_NAME[source.file.kind(stored)])
    order = source.stored.row_order(parameter)
    if order is None:
        return weight
    assert weight.codes is not None
    assert weight.grid is not None
    back = torch.argsort(order)
    return CompressedWeight(None, weight.error, weight.codes[back], weight.grid.rows(back))


def _recognises(folder: Path) -> bool:
    return folder / GGUF in containers(folder)


def _loaded_bytes(folder: Path, _: Contents) -> LoadedBytes:
    """llama.cpp keeps every tensor as it is stored."""
    file = GgufFile(folder / GGUF)
    return LoadedBytes(sum(file.size(name) for name in file.names()), "llama.cpp")


def _library() -> Any:
    """The package gguf.

    Raises:
        InputError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise InputError("--format gguf needs the package gguf: pip install 'srcr[gguf]'") from None
    return gguf


FORMAT = Format(
    name="gguf",
    summary="one file that llama.cpp runs: codes of 3 to 8 bits in blocks of 32 and 256 columns",
    check=check,
    write=_write,
    read=_read,
    recognises=_recognises,
    layout=_layout,
    loaded_bytes=_loaded_bytes,
    load=dequantizing(_read),
    notes=notes,
    loader=lambda contents: "srcr",
    check_model=_check_model,
    group_sizes=(BLOCK,),
    super_blocks=SUPER_BLOCKS,
    scale_dtype=lambda dtype: "float16",
    tolerance=OFFSET_ERROR,
)
