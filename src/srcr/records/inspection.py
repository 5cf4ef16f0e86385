"""What srcr sees in a model: what ``srcr inspect`` prints."""

from dataclasses import dataclass, field

from srcr.serialize import NULLABLE


@dataclass(frozen=True)
class InspectedGroup:
    """Linears that share an input, and their shapes (out_features, in_features)."""

    linears: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class InspectedEmbedding:
    """The input embedding or an output head of its own, its shape [rows, cols], and bits of a weight: 16, or
    what it is quantized to."""

    name: str
    shape: tuple[int, int]
    bits: int = 16


@dataclass(frozen=True)
class InspectedBlock:
    """A decoder block; its groups of linears are called units in the JSON."""

    name: str
    units: tuple[InspectedGroup, ...]


@dataclass(frozen=True)
class Inspection:
    """``parameters`` counts tied ones once, ``linear_parameters`` those of the blocks' linears;
    ``base_bytes``: weight files on disk; ``output_head`` None where the model has none."""

    model: str
    architecture: str
    dtype: str
    parameters: int
    linear_parameters: int
    base_bytes: int
    output_head: str | None = field(metadata=NULLABLE)
    tied_embeddings: bool
    quantized: bool
    blocks: tuple[InspectedBlock, ...]
    embeddings: tuple[InspectedEmbedding, ...] = ()
