"""inspect(): what srcr sees in a model."""

from pathlib import Path

from srcr.formats import recognised
from srcr.formats.checkpoint import Checkpoint, DequantizedSource
from srcr.models.checkpoint import ModelLike, OpenModel, open_model
from srcr.models.config import is_quantized
from srcr.models.load import resolve
from srcr.models.topology import Block, Topology
from srcr.numerics.tensors import dtype_name
from srcr.records.inspection import (
    InspectedBlock,
    InspectedEmbedding,
    InspectedGroup,
    Inspection,
)
from srcr.storage.index import containers


def inspect(model: ModelLike) -> Inspection:
    """What srcr sees in a model: blocks, linears, which share an input, parameters and bytes. Of a compressed
    checkpoint, whatever its format, weights are not read.

    Raises:
        InputError: the model cannot be loaded, or srcr cannot handle its architecture.

    >>> inspect("bundled").architecture
    'LlamaForCausalLM'
    """
    checkpoint = _compressed(model)
    opened = open_model(model) if checkpoint is None else _opened(str(model), checkpoint)
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
        quantized=_is_quantized(opened, checkpoint),
        blocks=tuple(_inspect_block(block, topology) for block in topology.blocks),
        embeddings=_inspect_embeddings(opened, checkpoint),
    )


def _compressed(model: ModelLike) -> Checkpoint | None:
    """The checkpoint of a folder whose weights are codes in a format that srcr reads; None for any other
    model, those that another tool has quantized in another form among them."""
    if not isinstance(model, str | Path):
        return None
    folder = resolve(model)
    if not (containers(folder) or is_quantized(folder)):
        return None
    fmt = recognised(folder)
    return None if fmt is None else fmt.read(folder)


def _opened(name: str, checkpoint: Checkpoint) -> OpenModel:
    return OpenModel(name, DequantizedSource(checkpoint), resolve(name))


def _is_quantized(opened: OpenModel, checkpoint: Checkpoint | None) -> bool:
    if checkpoint is not None:
        return bool(checkpoint.contents.schemes)
    return opened.folder is not None and is_quantized(opened.folder)


def _inspect_embeddings(
    opened: OpenModel, checkpoint: Checkpoint | None
) -> tuple[InspectedEmbedding, ...]:
    """The embeddings, with the bits that their checkpoint has them in."""
    schemes = {} if checkpoint is None else checkpoint.contents.schemes
    bits = {name: scheme.num_bits for name, scheme in schemes.items()}
    return tuple(
        InspectedEmbedding(name, shape, bits.get(name, 16))
        for name, shape in opened.topology.embedding_shapes.items()
    )


def _inspect_block(block: Block, topology: Topology) -> InspectedBlock:
    groups = (
        InspectedGroup(group.names, tuple(topology.shapes[name] for name in group.names))
        for group in block.decisions
    )
    return InspectedBlock(block.name, tuple(groups))
