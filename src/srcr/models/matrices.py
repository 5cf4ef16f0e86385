"""How a 2-D weight is named, and how it is read from a module and put there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # names and shapes are known without torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class MatrixRef:
    """A matrix [out_features, in_features] of a model: the parameter it lies in, ``index`` its place in a
    stack of them (None: the parameter is the matrix), ``transposed`` whether it is stored as [in_features,
    out_features] (GPT-2's Conv1D); ``half``: which half of the rows there it is (None: all), which are
    ``interleaved`` with those of the other half or behind them. A vector lies in a parameter likewise."""

    parameter: str
    index: int | None = None
    transposed: bool = False
    half: int | None = None
    interleaved: bool = False

    def view(self, parameter: Tensor) -> Tensor:
        """The matrix in the parameter's tensor."""
        return self.rows(parameter if self.index is None else parameter[self.index])

    def rows(self, entry: Tensor) -> Tensor:
        """The matrix in its entry of the stack."""
        matrix = entry.T if self.transposed and entry.ndim == 2 else entry
        if self.half is None:
            return matrix
        return matrix[self.half :: 2] if self.interleaved else matrix.chunk(2)[self.half]

    def stored(self, matrix: Tensor) -> Tensor:
        """A matrix as the parameter stores it."""
        return matrix.T if self.transposed else matrix

    def stack_shape(self, shape: Sequence[int], count: int) -> tuple[int, ...]:
        """The shape of the stack of ``count`` entries that a matrix or a vector of this ``shape`` lies in."""
        rows, *cols = shape
        entry = [rows if self.half is None else 2 * rows, *cols]
        return (count, *(reversed(entry) if self.transposed else entry))

    @property
    def module(self) -> str:
        """The name of the module that holds the parameter."""
        return self.parameter.rpartition(".")[0]


def read_matrix(module: nn.Module, ref: MatrixRef, prefix: str = "") -> Tensor:
    """A view of the matrix [out_features, in_features] that ``module`` (``prefix`` in the model) holds."""
    owner, key = _owner(module, ref, prefix)
    parameter = owner._parameters[key]
    assert parameter is not None
    return ref.view(parameter)


def replace_matrix(module: nn.Module, ref: MatrixRef, matrix: Tensor, prefix: str = "") -> None:
    """Give ``module`` another matrix; the old parameter stays as it is for whoever else holds it."""
    from torch import nn

    owner, key = _owner(module, ref, prefix)
    if ref.index is None:
        owner._parameters[key] = nn.Parameter(ref.stored(matrix), False)
        return
    parameter = owner._parameters[key]
    assert parameter is not None
    stack = parameter.detach().clone()
    stack[ref.index] = ref.stored(matrix)
    owner._parameters[key] = nn.Parameter(stack, False)


def _owner(module: nn.Module, ref: MatrixRef, prefix: str) -> tuple[nn.Module, str]:
    """The module that holds the parameter, and its name there."""
    name = ref.parameter.removeprefix(f"{prefix}.") if prefix else ref.parameter
    owner, _, key = name.rpartition(".")
    return module.get_submodule(owner), key
