"""The values that flow between the folders: frozen, small, and serialisable.

Anything read from a file goes through :func:`from_dict` or :func:`from_yaml`, which check types and
refuse unknown keys; anything written goes through :func:`to_dict` or :func:`to_yaml`.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from srcr.errors import InputError
from srcr.numerics.grid import Grid
from srcr.numerics.masks import UNSTRUCTURED, parse_structure
from srcr.numerics.products import product

Mode = Literal["joint", "sequential-a", "sequential-b"]
T = TypeVar("T")

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class PruneSpec:
    """How a layer is pruned. ``sparsity`` is the fraction that becomes zero, in [0, 1); with an
    "N:M" ``mask_structure`` (N of every M neighbours are kept) it must be ``1 - N/M``."""

    __pydantic_config__ = _STRICT

    method: str = "sparsegpt"
    sparsity: float = 0.5
    mask_structure: str = UNSTRUCTURED

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise InputError(
                f"sparsity {self.sparsity} is out of range: it is the fraction of weights that "
                "become zero, from 0 up to but not including 1 (0.25 for 25 %)"
            )
        pattern = parse_structure(self.mask_structure)
        if pattern and abs(self.sparsity - (1 - pattern[0] / pattern[1])) > 1e-9:
            raise InputError(
                f"sparsity {self.sparsity} contradicts {self.mask_structure}, which gives "
                f"{1 - pattern[0] / pattern[1]:g}: leave the sparsity out"
            )

    @classmethod
    def of(cls, method: str, sparsity: float, mask_structure: str = UNSTRUCTURED) -> "PruneSpec":
        """A spec whose sparsity follows from an N:M structure where one is given."""
        pattern = parse_structure(mask_structure)
        return cls(method, 1 - pattern[0] / pattern[1] if pattern else sparsity, mask_structure)


@dataclass(frozen=True)
class QuantSpec:
    """How a layer is quantized: ``num_bits`` from 2 to 8, ``group_size`` columns sharing a scale
    (-1: the whole row; "auto": 128 where it divides the width, else the whole row), ``symmetric``
    around 0 or with an integer zero-point, ``actorder`` "static" (columns swept by falling ``diag(H)``,
    groups as they stand in the file) or None."""

    __pydantic_config__ = _STRICT

    method: str = "gptq"
    num_bits: int = 4
    group_size: int | Literal["auto"] = "auto"
    symmetric: bool = True
    actorder: Literal["static"] | None = "static"

    def __post_init__(self) -> None:
        if not 2 <= self.num_bits <= 8:
            raise InputError(
                f"num_bits {self.num_bits} is out of range: 2 to 8 (16 means no quantization)"
            )
        if isinstance(self.group_size, int) and self.group_size != -1 and self.group_size < 1:
            raise InputError(f"group_size {self.group_size} must be -1 (channel-wise) or positive")


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one linear layer; None leaves that half alone."""

    __pydantic_config__ = _STRICT

    name: str
    prune: PruneSpec | None = None
    quant: QuantSpec | None = None

    @property
    def bits(self) -> int:
        """Bits of a kept weight: 16 when not quantized."""
        return self.quant.num_bits if self.quant else 16

    @property
    def sparsity(self) -> float:
        """Planned fraction of zeros."""
        return self.prune.sparsity if self.prune else 0.0


#: The dense model runs on at least this share of the calibration batches where nothing else is said, and
#: on at least so many tokens for every input of the widest linear: the regression on its inputs has that many
#: unknowns (docs/decisions/009).
DENSE_SHARE, DENSE_TOKENS = 0.25, 8


@dataclass(frozen=True)
class SweepSpec:
    """How every layer is solved: ``mode`` (one pass, or the paper's sequences), ``dampening_frac``
    of the mean diagonal added to the Hessian, ``block_size`` columns a block, ``dense_targets``
    (reproduce the dense model's outputs rather than the compressed model's own), ``descent_rounds`` of
    refitted scales and coordinate descent after the sweep, ``dense_share`` of the calibration batches on
    which the dense model runs for its targets (None: a quarter, or as many as make :data:`DENSE_TOKENS`
    tokens for every input of the widest linear)."""

    __pydantic_config__ = _STRICT

    mode: Mode = "joint"
    dampening_frac: float = 0.01
    block_size: int = 128
    dense_targets: bool = True
    descent_rounds: int = 2
    dense_share: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.dampening_frac <= 1:
            raise InputError(f"dampening_frac {self.dampening_frac} must be between 0 and 1")
        if self.block_size < 1:
            raise InputError(f"block_size {self.block_size} must be positive")
        if self.dense_share is not None and not 0 < self.dense_share <= 1:
            raise InputError(
                f"dense_share {self.dense_share} must be above 0 and at most 1 (dense_targets: false runs "
                "the dense model on nothing)"
            )
        if self.descent_rounds < 0:
            raise InputError(f"descent_rounds {self.descent_rounds} must not be negative")

    def dense_batches(self, batches: int, tokens: int, width: int) -> int:
        """On how many of so many batches, of ``tokens`` in all, the dense model runs, where the widest
        linear has so many inputs."""
        if not self.dense_targets:
            return 0
        share = self.dense_share
        if share is None:
            share = min(1.0, max(DENSE_SHARE, DENSE_TOKENS * width / tokens))
        return math.ceil(share * batches)


@dataclass(frozen=True)
class Target:
    """A size to reach: exactly one of the three."""

    __pydantic_config__ = _STRICT

    tcr: float | None = None
    stored_bytes: int | None = None
    loaded_bytes: int | None = None

    def __post_init__(self) -> None:
        given = [
            value for value in (self.tcr, self.stored_bytes, self.loaded_bytes) if value is not None
        ]
        if len(given) != 1:
            raise InputError("a target is exactly one of tcr, stored_bytes and loaded_bytes")


@dataclass(frozen=True)
class CompressionPlan:
    """The plan of a whole model, one entry for each linear layer of its decoder blocks."""

    __pydantic_config__ = _STRICT

    layers: tuple[LayerPlan, ...]
    target: Target | None = None
    seed: int = 0
    sweep: SweepSpec = field(default_factory=SweepSpec)

    def fingerprint(self) -> str:
        """A hash of everything that decides the result."""
        text = json.dumps(to_dict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def by_name(self) -> dict[str, LayerPlan]:
        """The plan of each layer by its module name."""
        return {layer.name: layer for layer in self.layers}


@dataclass(frozen=True, eq=False)
class LayerStats:
    """``hessian`` [cols, cols] = X^T X of the inputs X that the compressed model sees, ``cross``
    [cols, cols] = X_d^T X with the dense model's inputs X_d (None: same as the Hessian), or in its place
    ``pulled``: ``W cross`` [rows, cols] of each linear W by name. Where the dense model saw some of the
    tokens only, those two are of these, and ``matched`` [cols, cols] is X^T X of them too (None: of all)."""

    hessian: Tensor
    n_tokens: int
    cross: Tensor | None = None
    pulled: dict[str, Tensor] | None = None
    matched: Tensor | None = None

    def settle(self, weights: Mapping[str, Tensor]) -> "LayerStats":
        """The same with ``pulled`` for these weights and without ``cross``, whose memory can go."""
        if self.cross is None:
            return self
        pulled = {name: product(W, self.cross) for name, W in weights.items()}
        return replace(self, cross=None, pulled=pulled)


@dataclass(frozen=True, eq=False)
class CompressedWeight:
    """One compressed linear weight [rows, cols].

    Quantized: ``codes`` int8 [rows, cols] on ``grid``. Not quantized: ``values`` in the checkpoint's
    dtype. ``mask`` bool [rows, cols] is True where a weight was kept (None: nothing was pruned).
    ``error`` is the squared output error per token relative to the layer's output energy.
    """

    mask: Tensor | None
    error: float
    codes: Tensor | None = None
    grid: Grid | None = None
    values: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The weight as the engine sees it, float32 [rows, cols]."""
        if self.values is not None:
            return self.values.to(torch.float32)
        assert self.codes is not None
        assert self.grid is not None
        return self.grid.dequantize(self.codes)


@dataclass(frozen=True)
class Estimate:
    """A measured value with its 95 % interval over ``n`` documents."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Comparison:
    """A prompt, how each model goes on, and how similar that is (1: the same)."""

    prompt: str
    base: str
    compressed: str
    similarity: float


@dataclass(frozen=True)
class Rates:
    """How much smaller: see docs/measures.md for what each byte count includes."""

    sparsity: float
    bits: float
    tcr: float
    zeros: float
    base_bytes: int
    stored_bytes: int
    loaded_bytes: int
    engine: str
    source: str
    entropy_bits: float | None = None


@dataclass(frozen=True)
class LayerRecord:
    """What happened to one layer: sparsity of its mask, bits, TCr, counted zeros, the entropy of its codes
    in bits a weight, and its output error (relative, squared)."""

    name: str
    shape: tuple[int, int]
    sparsity: float
    bits: int
    tcr: float
    zeros: float
    entropy_bits: float
    error: float


@dataclass(frozen=True)
class RunRecord:
    """Everything needed to understand and repeat a run; written as ``srcr.json``."""

    base: str
    base_sha256: str
    command: str
    format: str
    rates: Rates
    plan_fingerprint: str
    calibration: dict[str, Any]
    layers: tuple[LayerRecord, ...]
    versions: dict[str, str]
    seconds: float
    peak_memory_bytes: int
    notes: tuple[str, ...] = ()


def to_dict(value: Any) -> dict[str, Any]:
    """A dataclass as plain JSON types; fields that are None by default and None are left out."""

    def plain(item: Any) -> Any:
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            pairs = ((f, getattr(item, f.name)) for f in dataclasses.fields(item))
            return {f.name: plain(p) for f, p in pairs if p is not None or f.default is not None}
        if isinstance(item, tuple | list):
            return [plain(part) for part in item]
        if isinstance(item, dict):
            return {str(key): plain(part) for key, part in item.items()}
        return item

    result = plain(value)
    assert isinstance(result, dict)
    return result


def from_dict(kind: type[T], data: Any, where: str = "input") -> T:
    """Build ``kind`` from plain data, refusing unknown keys.

    Raises:
        InputError: names the place and the value that do not fit.
    """
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(part) for part in problem['loc']) or where}: {problem['msg']}"
            for problem in error.errors()
        ]
        raise InputError(f"{where} does not fit {kind.__name__}: " + "; ".join(lines)) from None


def to_yaml(value: Any) -> str:
    """A dataclass as YAML that people can read and edit."""
    return yaml.safe_dump(to_dict(value), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """Safe YAML with decimal numbers only: YAML 1.1 would read the structure 2:4 as base 60."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if not tag.endswith((":int", ":float"))]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def from_yaml(kind: type[T], path: Path) -> T:
    """Read ``kind`` from a YAML (or JSON) file.

    Raises:
        InputError: the file is missing, not YAML, or does not fit.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: what looks like a date and is none
        raise InputError(f"{path} is not valid YAML: {error}") from None
    return from_dict(kind, data, where=str(path))
