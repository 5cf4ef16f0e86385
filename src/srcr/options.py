"""Options that every command which calibrates or writes a model shares: from the command line, from a
``--config`` file with the same names, or the defaults; in that order."""

import dataclasses
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from srcr.compression import Calibration, Recipe
from srcr.errors import InputError, NotAvailableYetError
from srcr.methods import get_pruner, get_quantizer
from srcr.numerics.masks import UNSTRUCTURED, parse_structure
from srcr.types import (
    CompressionPlan,
    Mode,
    PruneSpec,
    QuantSpec,
    SweepSpec,
    from_dict,
    from_yaml,
)

if TYPE_CHECKING:
    from srcr.planning.building import Space

#: Structures that a later version brings.
STRUCTURED = ("channels", "heads", "layers")
#: Options that say what a plan says.
DECIDED_BY_A_PLAN = (
    "sparsity", "structure", "bits", "group_size", "symmetric", "prune_method", "quant_method",
    "mode", "dampening_frac", "dense_targets", "dense_share", "descent_rounds",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Everything is optional: None means "as the config file, or the default, says"."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read by pydantic

    sparsity: float | None = None
    structure: str | None = None
    bits: int | None = None
    group_size: str | int | None = None
    symmetric: bool | None = None
    prune_method: str | None = None
    quant_method: str | None = None
    mode: Mode | None = None
    dampening_frac: float | None = None
    dense_targets: bool | None = None
    dense_share: float | None = None
    descent_rounds: int | None = None
    plan: str | None = None
    calibration: str | None = None
    samples: int | None = None
    seq_len: int | None = None
    format: str | None = None
    seed: int | None = None
    device: str | None = None
    memory: str | None = None
    sparsities: list[float] | None = None
    widths: list[int] | None = None

    def over(self, config: Path | None) -> "Options":
        """These options where given, else those of the config file.

        Raises:
            InputError: the file cannot be read, or has a key that is no option.
        """
        if config is None:
            return self
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        chosen = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(from_yaml(Options, config), **chosen)

    def treatment(self) -> CompressionPlan | Recipe:
        """The plan that was named, or the uniform recipe that the options describe.

        Raises:
            InputError: values out of range, unknown names, or a plan together with what it decides.
        """
        if self.plan is not None:
            for name in DECIDED_BY_A_PLAN:
                if getattr(self, name) is not None:
                    option = name.replace("_", "-")
                    raise InputError(
                        f"--plan decides {option}: leave --{option} out, or edit the plan"
                    )
            return from_yaml(CompressionPlan, Path(self.plan))
        bits = 4 if self.bits is None else self.bits
        quant = None
        method = get_quantizer(self.quant_method or "gptq").name
        if bits != 16:
            quant = QuantSpec(method, bits, self._group_size(), self.symmetric is not False)
        chosen = {
            "mode": self.mode,
            "dampening_frac": self.dampening_frac,
            "dense_targets": self.dense_targets,
            "dense_share": self.dense_share,
            "descent_rounds": self.descent_rounds,
        }
        given = {name: value for name, value in chosen.items() if value is not None}
        return Recipe(self._prune(), quant, from_dict(SweepSpec, given, "the options"))

    def _prune(self) -> PruneSpec | None:
        structure = self.structure or UNSTRUCTURED
        if structure in STRUCTURED:
            raise NotAvailableYetError(f"--structure {structure}")
        method = get_pruner(self.prune_method or "sparsegpt").name
        pattern = parse_structure(structure)
        if pattern is not None and self.sparsity is None:
            return PruneSpec.of(method, 0, structure)
        spec = PruneSpec(method, self.sparsity or 0.0, structure)
        return spec if spec.sparsity > 0 else None

    def _group_size(self) -> int | Literal["auto"]:
        if self.group_size is None or self.group_size == "auto":
            return "auto"
        try:
            size = int(self.group_size)
        except ValueError:
            size = 0
        if size != -1 and size < 1:
            raise InputError(
                f"group size {self.group_size!r}: use auto, -1 (channel-wise) or a number"
            )
        return size

    def space(self) -> "Space":
        """The levels that a plan chooses from, and how each is made.

        Raises:
            InputError: as :meth:`treatment`; options that the levels decide.
        """
        from srcr.planning.building import Space
        from srcr.planning.levels import BITS, SPARSITIES, Treatment, grid

        for name in ("sparsity", "structure", "bits", "plan"):
            if getattr(self, name) is not None:
                raise InputError(
                    f"--{name} is for one treatment of all layers; here --sparsities and --widths name what "
                    "each layer may have"
                )
        one = replace(self, sparsity=0.5, bits=4, sparsities=None, widths=None).treatment()
        assert isinstance(one, Recipe)
        assert one.prune is not None
        assert one.quant is not None
        levels = grid(
            SPARSITIES if self.sparsities is None else self.sparsities,
            BITS if self.widths is None else self.widths,
        )
        return Space(levels, Treatment(one.prune, one.quant), one.sweep)

    def data(self) -> Calibration:
        """Where calibration data comes from."""
        default = Calibration()
        return Calibration(
            self.calibration or default.source,
            self.samples,
            default.seq_len if self.seq_len is None else self.seq_len,
        )
