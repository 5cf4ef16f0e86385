"""Weights that stand in for a model's own, so that it runs without any of them being read.

What is learnt by watching a model run (which linears share an input, whether it is its blocks in a row,
which rows feed which columns) does not depend on its weights. A linear is a product of two thin random
matrices; any other parameter is a window that slides over a short random vector, so that rows differ and no
memory is taken.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from srcr.models.experts import routers_of
from srcr.models.streaming import device_of, filled, replaced_forward

#: Inner dimension of a linear's stand-in.
RANK = 8
#: Mean and deviation of other parameters: near those of a trained norm.
MEAN, DEVIATION = 1.0, 0.3

#: ``(name of a linear, its input, its output)``: the output that the model goes on with.
OnLinear = Callable[[str, Tensor, Tensor], Tensor]


@dataclass
class StandInTensors:
    """Stand-ins of the parameters among a model's tensors by name, float32; buffers are as they are.
    ``track``: where given, vectors get gradients and are put there by name."""

    state: Mapping[str, Tensor]
    device: torch.device
    track: dict[str, nn.Parameter] | None = None

    def get(self, name: str) -> Tensor:
        """A stand-in of the parameter's shape."""
        original = self.state[name]
        if not isinstance(original, nn.Parameter):
            return original
        shape = original.shape
        values = torch.randn(sum(shape) + 1, generator=_generator(name)).mul_(DEVIATION)
        window = values.add_(MEAN).to(self.device).as_strided(shape, (1,) * len(shape))
        if self.track is None or len(shape) != 1:
            return window
        return self.track.setdefault(name, nn.Parameter(window.clone(), True))


@contextmanager
def stand_ins(
    model: nn.Module,
    on_linear: OnLinear | None = None,
    track: dict[str, nn.Parameter] | None = None,
) -> Iterator[None]:
    """While this is open, ``model`` runs on stand-ins for its weights. ``on_linear`` sees every linear's
    input and output, and may replace the output; ``track`` collects the other vectors with gradients."""
    routers = routers_of(model)  # which give more than a product
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name not in routers
    }
    tensors = StandInTensors(model.state_dict(keep_vars=True), device_of(model), track)
    forwards = {m: _linear(n, m, on_linear) for n, m in linears.items()}
    with filled(model, tensors), replaced_forward(forwards):
        yield


def _linear(name: str, module: nn.Module, on_linear: OnLinear | None) -> Callable[[Tensor], Tensor]:
    """The forward of a linear's stand-in: ``x V^T U^T + bias`` with V [RANK, in] and U [out, RANK]."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows, cols = weight.T.shape if isinstance(module, Conv1D) else weight.shape

    def forward(x: Tensor) -> Tensor:
        generator = _generator(name)  # here: all of a large model's together are gigabytes
        V = torch.randn(RANK, cols, generator=generator) * cols**-0.5
        U = torch.randn(rows, RANK, generator=generator) * RANK**-0.5
        y = (x.detach().to(V.dtype) @ V.T.to(x.device) @ U.T.to(x.device)).to(x.dtype)
        if isinstance(module.bias, Tensor):
            y = y + module.bias.detach().to(y.dtype)
        return y if on_linear is None else on_linear(name, x, y)

    return forward


def _generator(name: str) -> Any:
    """A source of random numbers of its own for each name."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))
