"""inspect(): what srcr sees in a model."""

from contextlib import suppress
from pathlib import Path

from srcr.errors import InputError
from srcr.formats import detect, recognised
from srcr.formats.checkpoint import DequantizedSource
from srcr.models.checkpoint import ModelLike, OpenModel, open_model
from srcr.models.config import is_quantized
from srcr.models.load import load_model, resolve
from srcr.models.topology import Block, Topology
from srcr.numerics.tensors import dtype_name
from srcr.records.inspection import (
    InspectedBlock,
    InspectedEmbedding,
    InspectedGroup,
    Inspection,
)


def inspect(model: ModelLike) -> Inspection:
    """What srcr sees in a model: blocks, linears, which share an input, parameters and bytes.

    Raises:
        InputError: the model cannot be loaded, or srcr cannot handle its architecture.

    >>> inspect("bundled").architecture
    'LlamaForCausalLM'
    """
    opened = _open(model)
    topology = opened.topology
    return Inspection(
        model=opened.name,
        architecture=opened.architecture,
        dtype=dtype_name(opened.dtype),
        parameters=opened.parameters,
        linear_parameters=sum(height * width for height, width in topology.shapes.values()),
        base_bytes=opened.weight_bytes,
        output_head=topology.head,
        tied_embeddings=topology.tied,
        quantized=opened.folder is not None and is_quantized(opened.folder),
        blocks=tuple(_inspect_block(block, topology) for block in topology.blocks),
        embeddings=_inspect_embeddings(opened),
    )


def _open(model: ModelLike) -> OpenModel:
    """The open model; of what srcr alone reads, by its format."""
    if isinstance(model, str | Path):
        folder = resolve(model)
        fmt = recognised(folder)
        if fmt is not None and fmt.load is not load_model:
            return OpenModel(str(model), DequantizedSource(fmt.read(folder)), folder)
    return open_model(model)


def _inspect_embeddings(opened: OpenModel) -> tuple[InspectedEmbedding, ...]:
    """The embeddings, with the bits that their checkpoint has them in."""
    bits: dict[str, int] = {}
    if opened.folder is not None and is_quantized(opened.folder):
        with suppress(
            InputError
        ):  # what another tool has quantized in a form that srcr does not read
            schemes = detect(opened.folder).read(opened.folder).contents.schemes
            bits = {name: scheme.num_bits for name, scheme in schemes.items()}
    return tuple(
        InspectedEmbedding(name, shape, bits.get(name, 16))
        for name, shape in opened.topology.embedding_shapes.items()
    )


def _inspect_block(block: Block, topology: Topology) -> InspectedBlock:
    groups = (
        InspectedGroup(group.names, tuple(topology.shapes[name] for name in group.names))
        for group in block.groups
    )
    return InspectedBlock(block.name, tuple(groups))
