"""``compressed-tensors``: ``pack-quantized``, as transformers and vLLM load it.

Codes are packed without gaps into int32 words, every width from 2 to 8. A pruned weight is an ordinary
code (the one that is 0); no ``sparsity_config`` is ever written, because vLLM refuses it.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srcr.errors import InputError
from srcr.formats import Loaded
from srcr.formats.safetensors_files import TensorFiles
from srcr.models.load import read_config
from srcr.models.topology import Topology
from srcr.numerics.grid import Grid
from srcr.types import CompressedWeight, CompressionPlan, LayerPlan, QuantSpec

#: Widths for which vLLM takes zero-points; symmetric ones it takes from 2 to 8.
VLLM_ZERO_POINT_BITS = (4, 8)


def check(plan: CompressionPlan, topology: Topology) -> None:
    """Refuses what pack-quantized, or the engines that read it, cannot hold.

    Raises:
        InputError: nothing is quantized; transposed linears (GPT-2); asymmetric with mixed settings.
    """
    schemes = {_scheme_key(layer.quant) for layer in plan.layers if layer.quant}
    if not schemes:
        raise InputError(
            "compressed-tensors holds quantized weights and this plan quantizes none (bits 16): use "
            "--format dense"
        )
    if topology.conv1d:
        raise InputError(
            f"compressed-tensors cannot hold {min(topology.conv1d)}, a Conv1D (stored transposed), "
            "which no engine matches: use --format dense"
        )
    planned = plan.by_name()
    for block in topology.blocks:
        for unit in block.units:
            names = [f"{block.name}.{name}" for name in unit.names]
            quants = [planned[name].quant if name in planned else None for name in names]
            if len({quant and _scheme_key(quant) for quant in quants}) > 1:
                raise InputError(
                    f"{', '.join(names)} share an input and are fused by serving engines: give them the "
                    "same bits, group size and symmetry, or use --format dense"
                )
    asymmetric = any(not symmetric for _, _, symmetric in schemes)
    if asymmetric and len(schemes) > 1:
        raise InputError(
            "compressed-tensors with zero-points and mixed settings is loaded by no current "
            "transformers: use the same asymmetric setting everywhere, --symmetric, or --format dense"
        )


def tensors(
    name: str, weight: CompressedWeight, dtype: torch.dtype, transposed: bool
) -> dict[str, Tensor]:
    """Packed codes, scale in ``dtype``, shape, packed zero-points; a plain weight if unquantized."""
    # Here, as in read(): who writes dense checkpoints need not wait for it.
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    if weight.codes is None or weight.grid is None:
        return {f"{name}.weight": weight.dequantize().to(dtype).contiguous()}
    grid = weight.grid
    result = {
        f"{name}.weight_packed": pack_to_int32(weight.codes, grid.num_bits),
        f"{name}.weight_scale": grid.scale.to(dtype).contiguous(),
        f"{name}.weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
    }
    if grid.zero_point is not None:
        zero = grid.zero_point.to(torch.int8)
        result[f"{name}.weight_zero_point"] = pack_to_int32(zero, grid.num_bits, packed_dim=0)
    return result


def _scheme_key(quant: QuantSpec) -> tuple[int, int, bool]:
    assert isinstance(quant.group_size, int)
    return quant.num_bits, quant.group_size, quant.symmetric


def quantization_config(plan: CompressionPlan, topology: Topology) -> dict[str, Any] | None:
    """One config group a setting; untouched linears and the output head are ignored by name."""
    groups: dict[tuple[int, int, bool], list[LayerPlan]] = {}
    for layer in plan.layers:
        if layer.quant is not None:
            groups.setdefault(_scheme_key(layer.quant), []).append(layer)
    planned = {layer.name for layer in plan.layers if layer.quant is not None}
    ignore = [name for name in topology.linears() if name not in planned]
    if topology.head is not None:
        ignore.append(topology.head)
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": ["Linear"] if len(groups) == 1 else [layer.name for layer in layers],
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": symmetric,
                    "strategy": "channel" if size == -1 else "group",
                    "group_size": None if size == -1 else size,
                    "dynamic": False,
                },
            }
            for i, ((bits, size, symmetric), layers) in enumerate(groups.items())
        },
        "ignore": ignore,
    }
    if any(not symmetric for _, _, symmetric in groups):
        config["dequantize"] = True  # transformers does not pack zero-points on its lazy path
    return config


def read(
    path: Path,
    names: list[str],
    transposed: frozenset[str],
    files: Sequence[Path] | None = None,
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Codes unpacked, and dequantized in the precision of the scale."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    config = read_config(path)
    with TensorFiles(path, files) as stored:
        for name in names:
            if f"{name}.weight_packed" not in stored:
                yield name, stored.get(f"{name}.weight").to(torch.float32), None
                continue
            bits = num_bits(config, name)
            shape = torch.Size(stored.get(f"{name}.weight_shape").tolist())
            codes = unpack_from_int32(stored.get(f"{name}.weight_packed"), bits, shape)
            scale = stored.get(f"{name}.weight_scale")
            zero = None
            if f"{name}.weight_zero_point" in stored:
                packed = stored.get(f"{name}.weight_zero_point")
                zero = unpack_from_int32(packed, bits, scale.shape, packed_dim=0)
                zero = zero.to(torch.float32)
            size = shape[1] // scale.shape[1]
            grid = Grid(scale.to(torch.float32), zero, bits, size, scale.dtype)
            yield name, grid.dequantize(codes), codes


def num_bits(config: dict[str, Any], name: str) -> int:
    """Bits of the linear ``name`` by the ``quantization_config`` of a config.json; 16 where it has none."""
    quantization = config.get("quantization_config") or {}
    if _matches(name, quantization.get("ignore") or []):
        return 16
    for group in quantization.get("config_groups", {}).values():
        if "Linear" in group["targets"] or _matches(name, group["targets"]):
            return int(group["weights"]["num_bits"])
    return 16


def _matches(name: str, targets: list[str]) -> bool:
    """Whether a module is among targets: names, or "re:" and a pattern."""
    return any(
        bool(re.match(target[3:], name)) if target.startswith("re:") else target == name
        for target in targets
    )


def loaded_bytes(path: Path) -> Loaded:
    """vLLM keeps the packed tensors; where it cannot serve a setting, transformers decompresses all."""
    groups = read_config(path)["quantization_config"]["config_groups"].values()
    with TensorFiles(path) as files:
        sizes = files.sizes()
        if all(
            group["weights"]["symmetric"] or group["weights"]["num_bits"] in VLLM_ZERO_POINT_BITS
            for group in groups
        ):
            return Loaded(sum(sizes.values()), "vllm")
        total = 0
        for name, size in sizes.items():
            base, _, kind = name.rpartition(".")
            if kind == "weight_packed":
                rows, cols = files.get(f"{base}.weight_shape").tolist()
                total += rows * cols * files.get(f"{base}.weight_scale").itemsize
            elif kind not in ("weight_scale", "weight_shape", "weight_zero_point"):
                total += size
        return Loaded(total, "transformers")
