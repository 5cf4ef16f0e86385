"""How much smaller a model is: theoretical, stored and loaded.

TCr and its composition are those of Laborde et al., arXiv 2505.07289, section III.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from srcr.errors import InputError
from srcr.files import RECORD
from srcr.formats import Loaded, compressed_tensors, get_format
from srcr.formats.safetensors_files import TensorFiles
from srcr.models.load import read_config, weight_files
from srcr.models.topology import Topology, linear_weight
from srcr.numerics.entropy import code_entropy, sparse_entropy
from srcr.types import CompressedWeight, LayerRecord, Rates

COMPRESSED_TENSORS = "compressed-tensors"
#: What each count includes, for people to read beside it.
INCLUDES = {
    "tcr": "linear layers of the decoder blocks against 16 bits; no scales, zero-points, embeddings, head",
    "entropy_bits": "bits a weight of the same layers if their codes were ideally entropy-coded; no scales",
    "base_bytes": "weight files of the original on disk: everything in them",
    "stored_bytes": "weight files on disk: codes, scales, zero-points, embeddings, head",
    "loaded_bytes": "weights that the named engine keeps in memory, embeddings and head included",
}


def layer_tcr(sparsity: float, bits: float) -> float:
    """Theoretical compression rate of a layer against 16 bits: ``1 - (1 - s) q / 16``."""
    return 1 - (1 - sparsity) * bits / 16


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


def file_bytes(folder: Path) -> int:
    """Bytes of the weight files on disk."""
    return sum(path.stat().st_size for path in weight_files(folder))


def planned_rates(
    shapes: Mapping[str, tuple[int, int]],
    layers: Iterable[LayerRecord],
    zeros: Mapping[str, float],
    base: Path,
    folder: Path,
    loaded: Loaded,
) -> Rates:
    """Rates of a model that was just compressed, from what happened to its ``layers``: sparsity counted in
    the masks, not assumed. ``zeros`` is the share of zeros in each layer that was left alone."""
    known = {layer.name: layer for layer in layers}
    rows = []
    nothing = entropy = total = 0.0
    for name, (height, width) in shapes.items():
        size, layer = height * width, known.get(name)
        rows.append((size, layer.sparsity, layer.bits) if layer else (size, 0.0, 16))
        entropy += size * (layer.entropy_bits if layer else 16.0)
        nothing += size * (layer.zeros if layer else zeros[name])
        total += size
    sparsity, bits, tcr = mean_rates(rows)
    return Rates(
        sparsity=sparsity, bits=bits, tcr=tcr, zeros=nothing / total,
        base_bytes=file_bytes(base), stored_bytes=file_bytes(folder),
        loaded_bytes=loaded.n_bytes, engine=loaded.engine, source=RECORD,
        entropy_bits=entropy / total,
    )  # fmt: skip


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


def measured_rates(
    base: Path, folder: Path, model: Any, topology: Topology, parameters: int
) -> Rates:
    """Rates of a checkpoint from its own config and weights.

    Bits come from its ``quantization_config``; sparsity is the zeros of layers that are not quantized
    (in quantized ones, pruned weights cannot be told from those that rounding made zero), and everything
    that the base has and the checkpoint has not: ``parameters`` counts the base's linear layers, so
    heads, channels and layers that were removed count as sparsity. The entropy is unknown where codes
    are stored in a way that srcr does not read.

    Raises:
        InputError: the checkpoint is quantized by another library than compressed-tensors.
    """
    config = read_config(folder)
    by = (config.get("quantization_config") or {}).get("quant_method", COMPRESSED_TENSORS)
    if by != COMPRESSED_TENSORS:
        raise InputError(
            f"{folder} is quantized by {by!r}, whose bits srcr cannot count: it rates plain and "
            f"{COMPRESSED_TENSORS} checkpoints"
        )
    zeros = {
        name: count_zeros([linear_weight(model.get_submodule(name))]) for name in topology.shapes
    }
    sizes = {name: height * width for name, (height, width) in topology.shapes.items()}
    bits = {name: compressed_tensors.num_bits(config, name) for name in sizes}
    kept = {n: sizes[n] * (1 - zeros[n] if bits[n] == 16 else 1) for n in sizes}
    present = sum(sizes.values())
    with TensorFiles(folder) as files:
        packed = any(name.endswith(".weight_packed") for name in files.names())
    fmt = get_format(COMPRESSED_TENSORS if packed else "dense")
    entropy: float | None = 0.0
    for name, _, codes in fmt.read(folder, list(sizes), topology.conv1d):
        if entropy is None or (codes is None and bits[name] != 16):
            entropy = None
        else:
            found = sparse_entropy(zeros[name]) if codes is None else code_entropy(codes)
            entropy += sizes[name] * found
    loaded = fmt.loaded_bytes(folder)
    total = max(parameters, present)
    return Rates(
        sparsity=1 - sum(kept.values()) / total,
        bits=sum(sizes[n] * bits[n] for n in sizes) / present,
        tcr=1 - sum(kept[n] * bits[n] for n in sizes) / (16 * total),
        zeros=sum(sizes[n] * zeros[n] for n in sizes) / present,
        base_bytes=file_bytes(base), stored_bytes=file_bytes(folder),
        loaded_bytes=loaded.n_bytes, engine=loaded.engine, source="config and weights",
        entropy_bits=None if entropy is None else entropy / total,
    )  # fmt: skip
