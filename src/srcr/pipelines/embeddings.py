"""The input embedding and the output head, quantized before the blocks: an overlay that the blocks are
calibrated on (docs/decisions/011)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from srcr.formats import native
from srcr.formats.checkpoint import Scheme
from srcr.methods import get_quantizer
from srcr.metrics.rates import count_zeros, entropy_bits, layer_tcr
from srcr.models.checkpoint import OpenModel
from srcr.models.transformed import Change, Read, TransformedSource
from srcr.numerics.compressed import CompressedWeight
from srcr.numerics.grid import GridSpec
from srcr.numerics.tensors import row_chunks
from srcr.pipelines.progress import stage
from srcr.plans.plan import CompressionPlan
from srcr.plans.specs import QuantSpec
from srcr.records.run import LayerRecord
from srcr.storage.safetensors import TensorFiles, save_tensors

#: Where they lie beside the journal of the blocks.
FILE = "embeddings.tensors"
#: Numbers that are rounded together.
CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True, eq=False)
class RoundedModel:
    """A model with its embeddings rounded (``opened``; itself where none are), the ``records`` of what was
    done, and the file that holds their codes (None: there are none)."""

    opened: OpenModel
    records: tuple[LayerRecord, ...] = ()
    file: Path | None = None


def round_embeddings(
    opened: OpenModel, plan: CompressionPlan, device: torch.device, folder: Path, quiet: bool
) -> RoundedModel:
    """The model with the embeddings of the plan rounded to nearest; their codes are written into ``folder``.
    Nothing random is in it: a run that is continued does it again."""
    planned = {
        layer.name: layer.quant for layer in plan.embeddings or () if layer.quant is not None
    }
    if not planned:
        return RoundedModel(opened)
    tensors: dict[str, Tensor] = {}
    records = []
    with stage("embeddings", len(planned), quiet) as bar:
        for name, quant in planned.items():
            bar.note(name)
            weight = round_to_nearest(opened.blockwise.matrix(name), quant, opened.dtype, device)
            tensors |= native.encode_all({name: weight})
            records.append(_record(name, weight, quant.num_bits, opened.dtype))
            bar.note(f"{name}  error {weight.error:.2e}", advance=1)
    path = folder / FILE
    save_tensors(tensors, path)
    source = TransformedSource(opened.source, _changes(opened, path, planned))
    return RoundedModel(opened.transformed(source), tuple(records), path)


def round_to_nearest(
    W: Tensor, quant: QuantSpec, dtype: torch.dtype, device: torch.device
) -> CompressedWeight:
    """``W`` [rows, cols] on the grid that the spec's method fits to it, every weight as important as any
    other; some rows at a time. Its error is that of the weights, relative, squared."""
    scheme, cols = Scheme.of(quant), W.shape[1]
    size = cols if scheme.group_size == -1 else scheme.group_size
    precision = quant.scale_precision(dtype)
    spec = GridSpec(scheme.num_bits, size, scheme.symmetric, *precision, quant.scale_bits)
    fit, importance = get_quantizer(quant.method).fit, torch.ones(cols, device=device)
    codes, scales, zero_points, wrong, energy = [], [], [], 0.0, 0.0
    for rows in row_chunks(W, CHUNK_ELEMENTS):
        part = W[rows].to(device, torch.float32)
        grid = fit(part, spec, importance, None)
        chosen = grid.expand().quantize(part).to(torch.int8)
        wrong += float((grid.dequantize(chosen) - part).double().square().sum())
        energy += float(part.double().square().sum())
        codes.append(chosen.cpu())
        scales.append(grid.scale.cpu())
        zero_points += [] if grid.zero_point is None else [grid.zero_point.cpu()]
    grid = spec.grid(torch.cat(scales), torch.cat(zero_points) if zero_points else None)
    return CompressedWeight(None, wrong / max(energy, 1e-30), torch.cat(codes), grid)


def _record(name: str, weight: CompressedWeight, bits: int, dtype: torch.dtype) -> LayerRecord:
    return LayerRecord(
        name=name,
        shape=weight.shape,
        sparsity=0.0,
        bits=bits,
        tcr=layer_tcr(0.0, bits),
        zeros=count_zeros([weight.dequantize().to(dtype)]),
        entropy_bits=entropy_bits(weight),
        error=weight.error,
    )


def _changes(opened: OpenModel, path: Path, names: Mapping[str, QuantSpec]) -> dict[str, Change]:
    """What shows each embedding as the file at ``path`` has it."""
    files = TensorFiles(path.parent, [path])

    def rounded(name: str, parameter: str, read: Read) -> Tensor:
        stored = read(parameter)
        if stored.is_meta:
            return stored
        return native.decode_from(files.entries, files.get, name).dequantize().to(stored)

    refs = {name: opened.topology.matrix(name).parameter for name in names}
    stored = set(opened.source.names())
    tied = opened.topology.head
    changes: dict[str, Change] = {}
    for name, parameter in refs.items():
        if parameter not in stored and opened.topology.tied and tied is not None:
            parameter = f"{tied}.weight"  # the files have it under the head's name
        changes[parameter] = partial(rounded, name, parameter)
    return changes
