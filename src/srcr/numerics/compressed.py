"""A compressed weight, as the solver makes it and every format stores it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from srcr.numerics.grid import Grid


@dataclass(frozen=True, eq=False)
class CompressedWeight:
    """A compressed linear weight [rows, cols].

    Quantized: ``codes`` int8 [rows, cols] on ``grid``. Not quantized: ``values`` in the checkpoint's
    dtype. ``mask`` bool [rows, cols] is True where a weight was kept (None: nothing was pruned).
    ``error`` is the squared output error relative to the layer's output energy.
    """

    mask: Tensor | None
    error: float
    codes: Tensor | None = None
    grid: Grid | None = None
    values: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        tensor = self.codes if self.codes is not None else self.values
        assert tensor is not None
        return tensor.shape[0], tensor.shape[1]

    def dequantize(self) -> Tensor:
        """The weight as the engine sees it, float32 [rows, cols]."""
        if self.values is not None:
            return self.values.to(torch.float32)
        assert self.codes is not None
        assert self.grid is not None
        return self.grid.dequantize(self.codes)

    def to(self, device: torch.device | str) -> "CompressedWeight":
        """The same weight on another device."""
        mask, codes, values = (
            None if t is None else t.to(device) for t in (self.mask, self.codes, self.values)
        )
        grid = None if self.grid is None else self.grid.to(device)
        return CompressedWeight(mask, self.error, codes, grid, values)

    def cpu(self) -> "CompressedWeight":
        """The same weight in main memory."""
        return self.to("cpu")
