"""How much smaller a model is: theoretical, stored and loaded.

TCr and its composition are those of Laborde et al., arXiv 2505.07289, section III.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from srcr.models.checkpoint import OpenModel
from srcr.numerics.compressed import CompressedWeight
from srcr.numerics.entropy import code_entropy, sparse_entropy
from srcr.records.run import LayerRecord, LoadedBytes, Rates
from srcr.storage.index import file_bytes
from srcr.storage.layout import RECORD

#: Bits of a weight that is not quantized.
FULL_BITS = 16


@dataclass(frozen=True)
class LayerRates:
    """A linear layer: how many weights it has, the share that was pruned, bits of a kept one, the share that
    is exactly 0, and the entropy of what is stored in bits a weight (None: not known)."""

    size: int
    sparsity: float
    bits: float
    zeros: float
    entropy_bits: float | None


def layer_tcr(sparsity: float, bits: float) -> float:
    """Theoretical compression rate of a layer against 16 bits: ``1 - (1 - s) q / 16``."""
    return 1 - (1 - sparsity) * bits / FULL_BITS


def mean_rates(layers: Iterable[tuple[int, float, float]]) -> tuple[float, float, float]:
    """(sparsity, bits, TCr) of a model from (parameters, sparsity, bits) of every linear layer of its
    decoder blocks, weighted by parameters."""
    rows = list(layers)
    total = sum(size for size, _, _ in rows)
    return (
        sum(size * s for size, s, _ in rows) / total,
        sum(size * q for size, _, q in rows) / total,
        sum(size * layer_tcr(s, q) for size, s, q in rows) / total,
    )


def compressed_rates(
    base: OpenModel,
    smaller: OpenModel,
    layers: Iterable[LayerRecord],
    folder: Path,
    loaded: LoadedBytes,
) -> Rates:
    """Rates of a model that was just compressed into ``folder``, from what happened to its ``layers``:
    sparsity counted in the masks, not assumed. What ``smaller``, the base without the structures that were
    removed, does not have counts as sparsity."""
    known = {layer.name: layer for layer in layers}
    rows = []
    for name, (height, width) in smaller.topology.shapes.items():
        layer, size = known.get(name), height * width
        if layer is not None:
            row = LayerRates(size, layer.sparsity, layer.bits, layer.zeros, layer.entropy_bits)
        else:
            zeros = count_zeros([smaller.blockwise.matrix(name)])
            row = LayerRates(size, 0.0, FULL_BITS, zeros, float(FULL_BITS))
        rows.append(row)
    present = sum(row.size for row in rows)
    total = sum(height * width for height, width in base.topology.shapes.values())
    sparsity, bits, tcr = mean_rates((row.size, row.sparsity, row.bits) for row in rows)
    left = present / total
    return Rates(
        sparsity=1 - left * (1 - sparsity) if left < 1 else sparsity,
        bits=bits, tcr=1 - left * (1 - tcr) if left < 1 else tcr,
        zeros=sum(row.size * row.zeros for row in rows) / present,
        base_bytes=base.weight_bytes, stored_bytes=file_bytes(folder),
        loaded_bytes=loaded.n_bytes, engine=loaded.engine, source=RECORD,
        entropy_bits=_mean_entropy(rows, total),
    )  # fmt: skip


def measured_rates(
    layers: Sequence[LayerRates],
    base_size: int,
    base_bytes: int,
    stored_bytes: int,
    loaded: LoadedBytes,
) -> Rates:
    """Rates of a checkpoint whose history is not known, from its own config and weights.

    ``base_size`` counts the weights of the base's linear layers: everything that it has and the checkpoint
    has not (heads, channels, layers that were removed) counts as sparsity. In quantized layers, pruned
    weights cannot be told from those that rounding made zero: none counts as pruned.
    """
    present = sum(layer.size for layer in layers)
    total = max(base_size, present)
    kept = [layer.size * (1 - layer.sparsity) for layer in layers]
    bits = sum(size * layer.bits for size, layer in zip(kept, layers, strict=True))
    return Rates(
        sparsity=1 - sum(kept) / total,
        bits=sum(layer.size * layer.bits for layer in layers) / present,
        tcr=1 - bits / (FULL_BITS * total),
        zeros=sum(layer.size * layer.zeros for layer in layers) / present,
        base_bytes=base_bytes, stored_bytes=stored_bytes,
        loaded_bytes=loaded.n_bytes, engine=loaded.engine, source="config and weights",
        entropy_bits=_mean_entropy(layers, total),
    )  # fmt: skip


def _mean_entropy(layers: Sequence[LayerRates], total: int) -> float | None:
    """Bits a weight of ``total``; None where that of a layer is not known."""
    bits = [layer.entropy_bits for layer in layers]
    known = [x for x in bits if x is not None]
    if len(known) < len(bits):
        return None
    return sum(layer.size * x for layer, x in zip(layers, known, strict=True)) / total


def mask_sparsity(weight: CompressedWeight) -> float:
    """The fraction that the mask removed."""
    return 0.0 if weight.mask is None else 1 - float(weight.mask.sum()) / weight.mask.numel()


def entropy_bits(weight: CompressedWeight) -> float:
    """Bits a weight that an ideal entropy coder would need for the codes, or for 16-bit values with a
    mask."""
    if weight.codes is not None:
        return code_entropy(weight.codes)
    return sparse_entropy(mask_sparsity(weight))


def count_zeros(weights: Iterable[torch.Tensor]) -> float:
    """The fraction of weights that are exactly zero, whatever made them so."""
    zero = total = 0
    for weight in weights:
        zero += int((weight == 0).sum())
        total += weight.numel()
    return zero / total
