"""``dense``: plain safetensors in the base model's precision, for every engine and every plan."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srcr.formats import Loaded
from srcr.formats.safetensors_files import TensorFiles
from srcr.models.topology import Topology
from srcr.types import CompressedWeight, CompressionPlan


def check(plan: CompressionPlan, topology: Topology) -> None:
    """Every plan fits."""


def tensors(
    name: str, weight: CompressedWeight, dtype: torch.dtype, transposed: bool
) -> dict[str, Tensor]:
    """``NAME.weight`` in ``dtype``."""
    values = weight.dequantize().to(dtype)
    return {f"{name}.weight": (values.T if transposed else values).contiguous()}


def quantization_config(plan: CompressionPlan, topology: Topology) -> dict[str, Any] | None:
    """None: nothing tells a dense checkpoint from any other."""
    return None


def read(
    path: Path,
    names: list[str],
    transposed: frozenset[str],
    files: Sequence[Path] | None = None,
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Weights as they stand in the file, no codes."""
    with TensorFiles(path, files) as stored:
        for name in names:
            weight = stored.get(f"{name}.weight").to(torch.float32)
            yield name, weight.T if name in transposed else weight, None


def loaded_bytes(path: Path) -> Loaded:
    """Every tensor, as stored."""
    with TensorFiles(path) as files:
        return Loaded(sum(files.sizes().values()), "transformers")
