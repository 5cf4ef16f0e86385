"""How much smaller a model is: theoretical, stored and loaded.

TCr and its composition are those of Laborde et al., arXiv 2505.07289, section III.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from srcr.formats import Loaded, compressed_tensors, get_format
from srcr.formats.checkpoint import RECORD
from srcr.formats.safetensors_files import TensorFiles
from srcr.models.load import read_config, weight_files
from srcr.models.topology import Topology, linear_weight
from srcr.types import CompressedWeight, CompressionPlan, Rates


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
    plan: CompressionPlan,
    topology: Topology,
    compressed: dict[str, CompressedWeight],
    zeros: float,
    base: Path,
    folder: Path,
    loaded: Loaded,
) -> Rates:
    """Rates of a model that was just compressed: sparsity counted in the masks, not assumed."""
    planned = plan.by_name()
    rows = []
    for name, (height, width) in topology.shapes.items():
        mask = compressed[name].mask if name in compressed else None
        sparsity = 0.0 if mask is None else 1 - float(mask.sum()) / mask.numel()
        rows.append((height * width, sparsity, planned[name].bits if name in planned else 16))
    sparsity, bits, tcr = mean_rates(rows)
    return Rates(
        sparsity=sparsity, bits=bits, tcr=tcr, zeros=zeros,
        base_bytes=file_bytes(base), stored_bytes=file_bytes(folder),
        loaded_bytes=loaded.n_bytes, engine=loaded.engine, source=RECORD,
    )  # fmt: skip


def count_zeros(weights: Iterable[torch.Tensor]) -> float:
    """The fraction of weights that are exactly zero, whatever made them so."""
    zero = total = 0
    for weight in weights:
        zero += int((weight == 0).sum())
        total += weight.numel()
    return zero / total


def measured_rates(base: Path, folder: Path, model: Any, topology: Topology) -> Rates:
    """Rates of a checkpoint from its own config and weights.

    Bits come from its ``quantization_config``; sparsity is the zeros of layers that are not quantized
    (in quantized ones, pruned weights cannot be told from those that rounding made zero).
    """
    config = read_config(folder)
    zeros = {
        name: count_zeros([linear_weight(model.get_submodule(name))]) for name in topology.shapes
    }
    rows = []
    for name, (height, width) in topology.shapes.items():
        bits = compressed_tensors.num_bits(config, name)
        rows.append((height * width, zeros[name] if bits == 16 else 0.0, bits))
    sparsity, bits_mean, tcr = mean_rates(rows)
    total = sum(size for size, _, _ in rows)
    with TensorFiles(folder) as files:
        packed = any(name.endswith(".weight_packed") for name in files.names())
    loaded = get_format("compressed-tensors" if packed else "dense").loaded_bytes(folder)
    return Rates(
        sparsity=sparsity, bits=bits_mean, tcr=tcr,
        zeros=sum(h * w * zeros[n] for n, (h, w) in topology.shapes.items()) / total,
        base_bytes=file_bytes(base), stored_bytes=file_bytes(folder),
        loaded_bytes=loaded.n_bytes, engine=loaded.engine, source="config and weights",
    )  # fmt: skip
