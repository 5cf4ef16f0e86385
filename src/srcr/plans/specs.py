"""How a layer is pruned, quantized and solved."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from srcr.errors import InputError
from srcr.numerics.sparsity import UNSTRUCTURED, count_pruned, parse_structure
from srcr.numerics.super_blocks import SUPER_BLOCK
from srcr.serialize import STRICT

if TYPE_CHECKING:  # plans are read where nothing is computed
    import torch

#: What scales may be stored in, by torch's names.
ScaleDtype = Literal["float16", "bfloat16", "float32"]

Mode = Literal["joint", "sequential-a", "sequential-b"]
MODES: tuple[Mode, ...] = get_args(Mode)

#: The dense model runs on at least this share of the calibration batches where nothing else is said, and
#: on at least so many tokens for every input of the widest linear: the regression on its inputs has that many
#: unknowns (docs/decisions/009).
DENSE_SHARE, DENSE_TOKENS = 0.25, 8


@dataclass(frozen=True)
class PruneSpec:
    """How a layer is pruned. ``sparsity`` is the fraction that becomes zero, in [0, 1); with an
    "N:M" ``mask_structure`` (N of every M neighbours are kept) it must be ``1 - N/M``."""

    __pydantic_config__ = STRICT

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
        """A spec whose sparsity follows from an N:M structure where there is one."""
        pattern = parse_structure(mask_structure)
        return cls(method, 1 - pattern[0] / pattern[1] if pattern else sparsity, mask_structure)


@dataclass(frozen=True)
class QuantSpec:
    """How a layer is quantized: ``num_bits`` from 2 to 8, ``group_size`` columns sharing a scale
    (-1: the whole row; "auto": the first of 128, 64, 32 that divides the width, else the whole row),
    ``symmetric`` around 0 or with an integer zero-point, ``actorder`` "static" (columns swept by falling
    ``diag(H)``, groups as they stand in the file) or None, ``scale_dtype`` the precision of stored
    scales, which the engine then multiplies in float32 (None: the model's own for both). ``scale_bits``:
    scales are whole numbers of so many bits, times one of ``scale_dtype`` for 256 columns (None: none are).
    """

    __pydantic_config__ = STRICT

    method: str = "gptq"
    num_bits: int = 4
    group_size: int | Literal["auto"] = "auto"
    symmetric: bool = True
    actorder: Literal["static"] | None = "static"
    scale_dtype: ScaleDtype | None = None
    scale_bits: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.num_bits <= 8:
            raise InputError(
                f"num_bits {self.num_bits} is out of range: 2 to 8 (16 means no quantization)"
            )
        if isinstance(self.group_size, int) and self.group_size != -1 and self.group_size < 1:
            raise InputError(f"group_size {self.group_size} must be -1 (channel-wise) or positive")
        if self.scale_bits is not None:
            self._check_scale_bits(self.scale_bits)

    def _check_scale_bits(self, scale_bits: int) -> None:
        if not 2 <= scale_bits <= 8:
            raise InputError(f"scale_bits {scale_bits} is out of range: 2 to 8, or none")
        size = self.group_size
        if not self.symmetric or size == "auto" or size < 1 or SUPER_BLOCK % size:
            raise InputError(
                f"scale_bits needs symmetric grids and a group_size that divides {SUPER_BLOCK}, not "
                f"{'zero-points' if not self.symmetric else size}"
            )

    def scale_precision(self, own: "torch.dtype") -> "tuple[torch.dtype, torch.dtype]":
        """What scales are stored in, and what codes are multiplied by them in, of a model of its ``own``
        precision."""
        import torch

        if self.scale_dtype is None:
            return own, own
        return getattr(torch, self.scale_dtype), torch.float32


@dataclass(frozen=True)
class Override:
    """What some layers get instead of what all others do, by the names of the command line's options; None
    changes nothing. ``bits`` 16 quantizes nothing, ``sparsity`` 0 prunes nothing.

    >>> Override(bits=6).applied(None, QuantSpec(num_bits=4))[1].num_bits
    6
    """

    __pydantic_config__ = STRICT

    sparsity: float | None = None
    structure: str | None = None
    bits: int | None = None
    group_size: int | Literal["auto"] | None = None
    symmetric: bool | None = None
    prune_method: str | None = None
    quant_method: str | None = None

    def applied(
        self, prune: PruneSpec | None, quant: QuantSpec | None
    ) -> tuple[PruneSpec | None, QuantSpec | None]:
        """How a layer is pruned and quantized that all others are by ``prune`` and ``quant``."""
        return self._prune(prune), self._quant(quant)

    def _prune(self, others: PruneSpec | None) -> PruneSpec | None:
        others = others or PruneSpec(sparsity=0.0)
        structure = self.structure
        if structure is None:  # another sparsity leaves an N:M structure, which has its own
            structure = others.mask_structure if self.sparsity is None else UNSTRUCTURED
        sparsity = others.sparsity if self.sparsity is None else self.sparsity
        method = self.prune_method or others.method
        if parse_structure(structure) and self.sparsity is None:
            return PruneSpec.of(method, sparsity, structure)
        spec = PruneSpec(method, sparsity, structure)
        return spec if spec.sparsity > 0 else None

    def _quant(self, others: QuantSpec | None) -> QuantSpec | None:
        if self.bits == 16 or (others is None and self.bits is None):
            return None
        given = {
            "method": self.quant_method,
            "num_bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
        }
        changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        return replace(others or QuantSpec(), **changes)


@dataclass(frozen=True)
class SolverSpec:
    """How every layer is solved: ``mode`` (one pass, or the paper's sequences), ``dampening_frac`` of the
    mean diagonal added to the Hessian, ``block_size`` columns a block, ``dense_targets`` (reproduce the dense
    model's outputs rather than the compressed model's own), ``descent_rounds`` of refitted scales and
    coordinate descent after the sweep, ``dense_share`` of the calibration batches on which the dense model
    runs for its targets (None: a quarter, or as many as make :data:`DENSE_TOKENS` tokens for every input of
    the widest linear). Of experts: ``expert_prior``, as how many tokens a sample of all that their layer is
    given counts beside those that are routed to each (None: twice its inputs, docs/decisions/017), and
    ``expert_gates``, whether tokens weigh by their routing weights (None: they do not)."""

    __pydantic_config__ = STRICT

    mode: Mode = "joint"
    dampening_frac: float = 0.01
    block_size: int = 128
    dense_targets: bool = True
    descent_rounds: int = 2
    dense_share: float | None = None
    expert_prior: float | None = None
    expert_gates: bool | None = None

    def __post_init__(self) -> None:
        if self.expert_prior is not None and not self.expert_prior > 0:
            raise InputError(
                f"expert_prior {self.expert_prior} must be above 0: an expert that is given no token is "
                "known by it alone"
            )
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
        linear has ``width`` inputs."""
        if not self.dense_targets:
            return 0
        share = self.dense_share
        if share is None:
            share = min(1.0, max(DENSE_SHARE, DENSE_TOKENS * width / tokens))
        return math.ceil(share * batches)


@dataclass(frozen=True, order=True)
class CompressionLevel:
    """A share of zeros and a width; (0, 16) leaves a layer as it is."""

    sparsity: float
    num_bits: int

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1 or not (2 <= self.num_bits <= 8 or self.num_bits == 16):
            raise InputError(
                f"level {self}: sparsity is 0 up to but not including 1, bits are 2 to 8, or 16 for none"
            )

    def __str__(self) -> str:
        return f"{100 * self.sparsity:g}%+{self.num_bits}"

    def cost(self, size: int) -> int:
        """Theoretical bits of ``size`` weights: what is not pruned, times the width."""
        return (size - count_pruned(self.sparsity, size)) * self.num_bits
