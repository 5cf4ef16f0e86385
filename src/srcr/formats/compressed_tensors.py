"""``compressed-tensors``: ``pack-quantized``, as transformers and vLLM load it.

Codes are packed without gaps into int32 words, every width from 2 to 8. A pruned weight is an ordinary
code (the one that is 0); no ``sparsity_config`` is ever written, because vLLM refuses it.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srcr.errors import InputError
from srcr.formats import Format
from srcr.formats.checkpoint import Checkpoint, Contents, Scheme, check_own_scales
from srcr.formats.packed_loaders import (
    WORD_BITS,
    loader,
    notes,
    served_by_vllm,
    stacks_in_transformers,
)
from srcr.formats.shards import write_config, write_packed
from srcr.models.checkpoint import OpenModel
from srcr.models.config import quant_method, quantization_of
from srcr.models.load import load_model
from srcr.models.matrices import MatrixRef
from srcr.models.source import CheckpointSource
from srcr.models.topology import Topology
from srcr.models.unfuse import fuse
from srcr.models.validation import library_errors
from srcr.numerics.compressed import CompressedWeight
from srcr.numerics.grid import Grid
from srcr.numerics.tensors import dtype_name
from srcr.records.run import LoadedBytes
from srcr.storage.safetensors import TensorFiles

NAME = "compressed-tensors"
PACKED = "pack-quantized"
#: Bits of a weight that is not quantized.
FULL_BITS = 16
#: The linears of experts by the names that checkpoints on the hub give them.
EXPERTS = r"re:.*\.experts\.\d+\..*"


def check(contents: Contents) -> None:
    """Refuse what pack-quantized, or the engines that read it, cannot hold.

    Raises:
        InputError: nothing is quantized; transposed linears (GPT-2); asymmetric with mixed settings.
    """
    topology, schemes = contents.topology.as_stored(), set(contents.schemes.values())
    if not schemes:
        raise InputError(
            "compressed-tensors holds quantized weights and this plan quantizes none (bits 16): use "
            "--format dense"
        )
    stacked = [name for name in contents.schemes if topology.matrix(name).index is not None]
    if stacked:
        raise InputError(
            f"compressed-tensors cannot hold {stacked[0]}, which checkpoints of this architecture have in a "
            "stack of matrices: use --format dense"
        )
    if topology.transposed():
        raise InputError(
            f"compressed-tensors cannot hold {min(topology.transposed())}, a Conv1D (stored transposed), "
            "which no engine matches: use --format dense"
        )
    if contents.topology.needs_weights:
        raise InputError(
            "compressed-tensors cannot hold this architecture: transformers initialises its linear layers "
            "while it loads them, or looks for their weights under names that packed codes do not have: use "
            "--format dense"
        )
    check_own_scales(contents, "compressed-tensors")
    if len(schemes) > 1 and not all(scheme.symmetric for scheme in schemes):
        raise InputError(
            "compressed-tensors with zero-points and mixed settings is loaded by no current "
            "transformers: use the same asymmetric setting everywhere, --symmetric, or --format dense"
        )


def _layout(
    ref: MatrixRef, shape: tuple[int, int], scheme: Scheme | None, dtype: torch.dtype
) -> Mapping[str, Tensor]:
    """Packed codes, scale in ``dtype``, shape, packed zero-points; a plain weight without a scheme."""
    name, (rows, cols) = ref.parameter, shape

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if scheme is None:
        return {name: empty(dtype, rows, cols)}
    groups = 1 if scheme.group_size == -1 else cols // scheme.group_size
    tensors = {
        f"{name}_packed": empty(torch.int32, rows, _words(cols, scheme.num_bits)),
        f"{name}_scale": empty(dtype, rows, groups),
        f"{name}_shape": empty(torch.int64, 2),
    }
    if not scheme.symmetric:
        words = _words(rows, scheme.num_bits)
        tensors[f"{name}_zero_point"] = empty(torch.int32, words, groups)
    return tensors


def _words(values: int, num_bits: int) -> int:
    """Words that so many packed numbers take."""
    return -(-values * num_bits // WORD_BITS)


def _encode(ref: MatrixRef, weight: CompressedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of :func:`_layout`, with data."""
    # Here, as in _decode(): who writes dense checkpoints need not wait for it.
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    name, grid = ref.parameter, weight.grid
    if weight.codes is None or grid is None:
        return {name: weight.dequantize().to(dtype).contiguous()}
    scale = grid.scale.to(dtype)
    if not torch.equal(scale.to(torch.float32), grid.scale):
        chosen, stored = dtype_name(grid.dtype), dtype_name(dtype)
        raise InputError(
            f"the scales of {name} were chosen in {chosen}, and compressed-tensors stores them in {stored}, "
            "the model's precision: compress the original model, or use --format dense"
        )
    tensors = {
        f"{name}_packed": pack_to_int32(weight.codes, grid.num_bits),
        f"{name}_scale": scale.contiguous(),
        f"{name}_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
    }
    if grid.zero_point is not None:
        zero_point = grid.zero_point.to(torch.int8)
        tensors[f"{name}_zero_point"] = pack_to_int32(zero_point, grid.num_bits, packed_dim=0)
    return tensors


def _write(checkpoint: Checkpoint, folder: Path) -> None:
    checkpoint = checkpoint.stored()
    write_config(checkpoint, folder, quantization_config(checkpoint.contents))
    write_packed(checkpoint, folder, _layout, partial(_encode, dtype=checkpoint.dtype))


def quantization_config(contents: Contents) -> dict[str, Any]:
    """The ``quantization_config`` of config.json: a config group for each scheme; every linear that is not
    quantized, and an output head, is ignored by name."""
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in contents.schemes.items():
        groups.setdefault(scheme, []).append(name)
    topology = contents.topology
    ignore = [
        topology.matrix(name).module for name in topology.linears() if name not in contents.schemes
    ]
    ignore += topology.untouched
    if topology.head is not None and topology.head not in contents.schemes:
        ignore.append(topology.head)
    tables = contents.embeddings()
    config: dict[str, Any] = {
        "quant_method": NAME,
        "format": PACKED,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": _targets(names, contents) if tables or len(groups) > 1 else ["Linear"],
                "weights": {
                    "num_bits": scheme.num_bits,
                    "type": "int",
                    "symmetric": scheme.symmetric,
                    "strategy": "channel" if scheme.group_size == -1 else "group",
                    "group_size": None if scheme.group_size == -1 else scheme.group_size,
                    "dynamic": False,
                },
            }
            for i, (scheme, names) in enumerate(groups.items())
        },
        "ignore": ignore,
    }
    packed = topology.embedding in contents.schemes
    if (
        not all(scheme.symmetric for scheme in groups)
        or (packed and len(groups) == 1)
        or topology.experts
    ):
        # On its lazy path transformers packs neither zero-points nor embeddings, nor stacks of experts.
        config["dequantize"] = True
    return config


def _targets(names: Sequence[str], contents: Contents) -> list[str]:
    """The modules of a config group; experts by a pattern where all are in it, which tells transformers that
    the group is theirs."""
    topology = contents.topology
    routed = {name for name in topology.linears() if topology.routed(name)}
    patterns = [EXPERTS] if routed and routed <= set(names) else []
    return patterns + [
        topology.matrix(name).module for name in names if not patterns or name not in routed
    ]


def _read(folder: Path) -> Checkpoint:
    """The checkpoint, codes and grids as stored. Masks and errors are not: a pruned weight is a code like any
    other, so a weight's mask is None and its error NaN."""
    config = quantization_of(folder)
    files, opened = TensorFiles(folder), OpenModel(str(folder), CheckpointSource(folder), folder)
    tables = [
        name
        for name, ref in opened.topology.embeddings.items()
        if f"{ref.parameter}_packed" in files
    ]
    stored = opened.topology.as_stored()
    names = [*stored.linears(), *tables]
    schemes = {name: scheme_of(config, stored.matrix(name).module) for name in names}
    schemes = {name: scheme for name, scheme in schemes.items() if scheme.num_bits < FULL_BITS}
    contents = Contents(opened.topology, opened.config, schemes, tuple(schemes))
    return Checkpoint.of(opened, contents, partial(_decode, files, stored, schemes))


def _decode(
    files: TensorFiles, stored: Topology, schemes: Mapping[str, Scheme], name: str
) -> CompressedWeight:
    """The weight of a linear, which lies where the ``stored`` topology says.

    Raises:
        InputError: it is not packed.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    parameter, bits = stored.matrix(name).parameter, schemes[name].num_bits
    if f"{parameter}_packed" not in files:
        raise InputError(
            f"{files.folder} stores {name} in another way than {PACKED}, which srcr reads: compress the "
            "original model"
        )
    with library_errors(f"{name} in {files.folder} cannot be unpacked"):
        shape = torch.Size(files.get(f"{parameter}_shape").tolist())
        codes = unpack_from_int32(files.get(f"{parameter}_packed"), bits, shape)
        scale, zero_point = files.get(f"{parameter}_scale"), None
        if f"{parameter}_zero_point" in files:
            packed = files.get(f"{parameter}_zero_point")
            zero_point = unpack_from_int32(packed, bits, scale.shape, packed_dim=0)
            zero_point = zero_point.to(torch.float32)
        size = shape[1] // scale.shape[1]
        grid = Grid(scale.to(torch.float32), zero_point, bits, size, scale.dtype)
    return CompressedWeight(None, float("nan"), codes, grid)


def scheme_of(quantization: Mapping[str, Any], name: str) -> Scheme:
    """The scheme of a linear by a ``quantization_config``; 16 bits where it has none."""
    if not _matches(name, quantization.get("ignore") or []):
        for group in quantization.get("config_groups", {}).values():
            if "Linear" in group["targets"] or _matches(name, group["targets"]):
                weights = group["weights"]
                size = weights.get("group_size") or -1
                return Scheme(int(weights["num_bits"]), size, bool(weights.get("symmetric", True)))
    return Scheme(FULL_BITS, -1, True)


def _matches(name: str, targets: Sequence[str]) -> bool:
    """Whether a module is among targets: names, or "re:" and a pattern."""
    return any(
        bool(re.match(target[3:], name)) if target.startswith("re:") else target == name
        for target in targets
    )


def _load(folder: Path, dtype: torch.dtype | None) -> Any:
    """The model: by transformers, or where that cannot stack its experts, dequantized here."""
    if any(".experts." in name for name in TensorFiles(folder).entries):
        written = _read(folder)
        if not stacks_in_transformers(written.contents):
            return fuse(written.dequantized(dtype))
    return load_model(folder, dtype)


def _recognises(folder: Path) -> bool:
    return quant_method(folder) == NAME


def _loaded_bytes(folder: Path, contents: Contents) -> LoadedBytes:
    """vLLM keeps the packed tensors; where it cannot serve a setting, transformers (or srcr) decompresses
    all."""
    files = TensorFiles(folder)
    sizes = files.sizes()
    if served_by_vllm(contents):
        return LoadedBytes(sum(sizes.values()), "vllm")
    total = 0
    for name, size in sizes.items():
        base, _, kind = name.rpartition(".")
        if kind == "weight_packed":
            rows, cols = files.get(f"{base}.weight_shape").tolist()
            total += rows * cols * files.meta(f"{base}.weight_scale").itemsize
        elif kind not in ("weight_scale", "weight_shape", "weight_zero_point"):
            total += size
    return LoadedBytes(total, loader(contents))


FORMAT = Format(
    name=NAME,
    summary="packed codes of 2 to 8 bits, as transformers and vLLM load them",
    check=check,
    write=_write,
    read=_read,
    recognises=_recognises,
    layout=_layout,
    loaded_bytes=_loaded_bytes,
    load=_load,
    notes=notes,
    loader=loader,
)
