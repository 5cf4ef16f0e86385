"""What training changes of a compressed weight: real numbers behind its codes, and its scales.

The model that is trained holds the weights that an engine would compute. A step reads their gradients, passes
them straight through the rounding to the latent numbers (straight-through estimator: Bengio et al.,
arXiv 1308.3432, section 3), changes those, and puts the new weights into the model: whatever the step does,
zeros stay zeros and codes stay on their grid.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from srcr.numerics.compressed import CompressedWeight
from srcr.numerics.grid import Grid, code_range, round_product
from srcr.numerics.tensors import row_chunks

#: How far, in steps of the grid, a latent number may begin from its code.
WITHIN = 0.4


@dataclass(frozen=True, eq=False)
class LatentWeight:
    """A weight [rows, cols] that is trained. ``steps`` float32 [rows, cols]: how many steps of its grid each
    number is away from 0; ``log_gain`` float32 [rows, groups]: the logarithm of what its ``start`` scales are
    multiplied by. Of a weight without a grid a step is the root mean square of its row, and nothing is
    rounded. Its mask is that of ``compressed``."""

    compressed: CompressedWeight
    start: Tensor
    steps: Tensor
    log_gain: Tensor

    @classmethod
    def of(cls, compressed: CompressedWeight, original: Tensor | None = None) -> "LatentWeight":
        """The latent numbers of a compressed weight: at its codes, or where the ``original`` weight float32
        [rows, cols] is given, as near to that as rounding allows."""
        if compressed.codes is not None and compressed.grid is not None:
            start, steps = compressed.grid.scale.clone(), compressed.grid.steps(compressed.codes)
            if original is not None:
                _move_within_(steps, original, compressed.grid)
        else:
            assert compressed.values is not None
            values = compressed.values.to(torch.float32)
            start = values.square().mean(dim=1, keepdim=True).sqrt_().clamp_min_(1e-30)
            steps = values / start
        return cls(compressed, start, steps, torch.zeros_like(start))

    @property
    def grid(self) -> Grid | None:
        """The grid, with the scales that training has come to, rounded to what stores them."""
        grid = self.compressed.grid
        if grid is None:
            return None
        scale = grid.rounding()(self.start * self.log_gain.exp())
        return replace(grid, scale=scale)

    def write(self, weight: Tensor) -> None:
        """Put the numbers that an engine computes into ``weight`` [rows, cols]."""
        grid = self.grid
        for rows in row_chunks(self.steps):
            if grid is None:
                part = self.steps[rows] * self.start[rows]
                dtype = self._stored.dtype
                part = part.to(dtype).to(torch.float32)
                weight[rows] = (
                    part if self.compressed.mask is None else part * self.compressed.mask[rows]
                )
                continue
            steps = self._codes(rows)
            steps.view(len(steps), -1, grid.group_size).mul_(grid.scale[rows][..., None])
            weight[rows] = round_product(steps, grid.product_dtype)

    def gradients(self, gradient: Tensor) -> None:
        """Turn the ``gradient`` [rows, cols] of the weight, which is overwritten, into those of ``steps`` and
        ``log_gain``.

        With w = c s, c = round(v): dL/dv = s dL/dw and dL/dlog s = sum of w dL/dw over the scale's group.
        """
        grid = self.grid
        size = self.steps.shape[1] if grid is None else grid.group_size
        scale = self.start if grid is None else grid.scale
        gain = None if grid is None else torch.empty_like(self.log_gain)
        for rows in row_chunks(self.steps):
            part = gradient[rows]
            if self.compressed.mask is not None:
                part.mul_(self.compressed.mask[rows])
            part.view(len(part), -1, size).mul_(scale[rows][..., None])
            if gain is not None:
                gain[rows] = (self._codes(rows) * part).view(len(part), -1, size).sum(dim=-1)
        self.steps.grad, self.log_gain.grad = gradient, gain

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bring latent numbers back that have left the range of codes: beyond it their rounding moves no
        more."""
        if self.compressed.grid is None:
            return
        lowest, highest = self._range()
        size = self.compressed.grid.group_size
        steps = self.steps.view(len(self.steps), -1, size)
        steps.clamp_(lowest[..., None] - 0.5, highest[..., None] + 0.5)

    def result(self) -> CompressedWeight:
        """The weight that training has come to: of the same mask and bits. Its error is not known."""
        grid = self.grid
        if grid is None:
            values = torch.empty_like(self.steps)
            self.write(values)
            return CompressedWeight(
                self.compressed.mask, float("nan"), values=values.to(self._stored.dtype)
            )
        codes = torch.empty_like(self.steps, dtype=torch.int8)
        for rows in row_chunks(self.steps):
            steps = self._codes(rows)
            if grid.zero_point is not None:
                size = grid.group_size
                steps.view(len(steps), -1, size).add_(grid.zero_point[rows][..., None])
            codes[rows] = steps.to(torch.int8)
        return CompressedWeight(self.compressed.mask, float("nan"), codes, grid)

    @property
    def _stored(self) -> Tensor:
        assert self.compressed.values is not None
        return self.compressed.values

    def _codes(self, rows: slice) -> Tensor:
        """The codes of some rows, less their zero-points, float32."""
        lowest, highest = self._range(rows)
        grid = self.compressed.grid
        assert grid is not None
        steps = self.steps[rows].round()
        steps.view(len(steps), -1, grid.group_size).clamp_(lowest[..., None], highest[..., None])
        return steps if self.compressed.mask is None else steps.mul_(self.compressed.mask[rows])

    def _range(self, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The smallest and largest code less the zero-point, [rows, groups] each."""
        grid = self.compressed.grid
        assert grid is not None
        zero = torch.zeros_like(grid.scale) if grid.zero_point is None else grid.zero_point
        lowest, highest = code_range(grid.num_bits)
        return lowest - zero[rows], highest - zero[rows]


def _move_within_(steps: Tensor, original: Tensor, grid: Grid) -> None:
    """Move each of the codes ``steps``, less their zero-points, towards the original weight; it still rounds
    to the same code."""
    for rows in row_chunks(steps):
        part = original[rows].clone()
        part.view(len(part), -1, grid.group_size).div_(grid.scale[rows][..., None])
        steps[rows] += part.sub_(steps[rows]).clamp_(-WITHIN, WITHIN)
