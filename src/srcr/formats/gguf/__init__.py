"""``gguf``: one file that llama.cpp runs, codes as they are.

With scales for groups of 32 columns (or of a multiple) codes become blocks of Q4_0, Q5_0 and Q8_0; with
scales in units of super-blocks of 256 columns, those of Q3_K and Q6_K. Nothing is rounded again. Everything
else stays in the model's own precision, norms and routers in float32. The experts of a layer lie in stacks.
The folder holds config.json and tokenizer as well, so that srcr reads it back.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from srcr.errors import InputError
from srcr.formats import Format
from srcr.formats.checkpoint import Checkpoint, Contents, Scheme, dequantizing
from srcr.formats.gguf.architectures import TensorNames, check_config, library
from srcr.formats.gguf.blocks import (
    BLOCK,
    BY_NAME,
    SUPER_BLOCKS,
    block_type,
    type_of,
    unpack_blocks,
)
from srcr.formats.gguf.mixtures import check_stacks
from srcr.formats.gguf.source import OFFSET_ERROR, GgufFile, GgufSource
from srcr.formats.gguf.vocabulary import read_vocabulary
from srcr.formats.gguf.writing import write
from srcr.models.checkpoint import OpenModel
from srcr.models.matrices import MatrixRef
from srcr.numerics.compressed import CompressedWeight
from srcr.records.run import LoadedBytes
from srcr.storage.index import containers
from srcr.storage.layout import GGUF


def check(contents: Contents) -> None:
    """Refuse what llama.cpp, or blocks of 32, cannot hold.

    Raises:
        InputError: the architecture; zero-points; a width or a group size that 32 does not divide; experts
            of a layer that would be of different types.
    """
    library()
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
    check_stacks(contents)


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
    kinds = {(s.num_bits, type_of(s).name) for s in contents.schemes.values()}
    narrow = sorted((bits, name) for bits, name in kinds if BY_NAME[name].num_bits != bits)
    if narrow:
        bits = " and ".join(str(each) for each, _ in narrow)
        names = " and ".join(name for _, name in narrow)
        result.append(
            f"codes of {bits} bits are stored as {names}, which takes more: --format archive packs them"
        )
    if (
        contents.config.model_type in ("mistral", "mixtral")
        and contents.config.sliding_window is not None
    ):
        result.append(
            "llama.cpp has no sliding window for this model: it computes what transformers does for texts of "
            f"at most {contents.config.sliding_window} tokens"
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


def _layout(
    ref: MatrixRef, shape: tuple[int, int], scheme: Scheme | None, dtype: torch.dtype
) -> Mapping[str, Tensor]:
    """Blocks, as bytes; a plain weight without a scheme."""
    rows, cols = shape
    if scheme is None:
        return {ref.parameter: torch.empty(rows, cols, dtype=dtype, device="meta")}
    size = cols // type_of(scheme).columns * type_of(scheme).size
    return {ref.parameter: torch.empty(rows, size, dtype=torch.uint8, device="meta")}


def _read(folder: Path) -> Checkpoint:
    """The checkpoint: codes as stored, in the widths of their blocks, with a scale for each block."""
    library()
    file = GgufFile(folder / GGUF)
    source = GgufSource(folder, file)
    opened = OpenModel(str(folder), source, folder)
    topology = opened.topology
    schemes = {}
    for name in [*topology.linears(), *topology.embeddings]:
        parameter = topology.matrix(name).parameter
        if parameter in source.present:
            kind = BY_NAME.get(source.kind(parameter))
            if kind is not None:
                schemes[name] = Scheme(kind.num_bits, kind.group_size, True, kind.scale_bits)
    contents = Contents(topology, opened.config, schemes, tuple(schemes))
    return Checkpoint.of(opened, contents, partial(_decode, source, contents))


def _decode(source: GgufSource, contents: Contents, name: str) -> CompressedWeight:
    parameter = contents.topology.matrix(name).parameter
    weight = unpack_blocks(source.data(parameter), BY_NAME[source.kind(parameter)])
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


FORMAT = Format(
    name="gguf",
    summary="one file that llama.cpp runs: codes of 3 to 8 bits in blocks of 32 and 256 columns",
    check=check,
    write=write,
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
