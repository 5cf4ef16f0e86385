"""Products of bfloat16 matrices over their rows, ``X^T Y``, exact products summed in float32, by MKL on CPUs
with AMX or AVX-512 BF16: torch carries MKL's function, but gives access to it with rounded results alone."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srcr.environment import multiplies_bfloat16
from srcr.numerics.tensors import lower_panels

#: For the record.
ENGINE = "MKL"
#: CblasRowMajor, CblasNoTrans, CblasTrans.
_ROW_MAJOR, _AS_IS, _TRANSPOSED = 101, 111, 112


@cache
def _gemm() -> Any:
    """``cblas_gemm_bf16bf16f32`` of the library that torch has loaded; None in builds without it."""
    try:
        path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
        gemm = ctypes.CDLL(str(path)).cblas_gemm_bf16bf16f32
    except (OSError, AttributeError):
        return None
    size, factor, data = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    gemm.argtypes = [size] * 6 + [factor, data, size, data, size, factor, data, size]
    gemm.restype = None
    return gemm


@cache
def available() -> bool:
    """Whether MKL is there, does this at full speed on this CPU, and takes integers of 32 bits."""
    if not (multiplies_bfloat16() and _gemm()):
        return False
    x = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    moment = torch.ones(3, 3)
    accumulate(moment, x, x)
    return torch.equal(moment, 1 + x.float().T @ x.float())


def accumulate(moment: Tensor, left: Tensor, right: Tensor) -> None:
    """As :func:`srcr.numerics.moments.accumulate`, of bfloat16 matrices."""
    left, right = _by_rows(left), _by_rows(right)
    _gemm()(
        _ROW_MAJOR, _TRANSPOSED, _AS_IS, left.shape[1], right.shape[1], len(left),
        1.0, left.data_ptr(), _leading_dimension(left), right.data_ptr(), _leading_dimension(right),
        1.0, moment.data_ptr(), _leading_dimension(moment),
    )  # fmt: skip


def accumulate_gram(moment: Tensor, x: Tensor) -> None:
    """As :func:`srcr.numerics.moments.accumulate_gram`, of a bfloat16 matrix."""
    x = _by_rows(x)
    for rows, columns in lower_panels(len(moment)):
        accumulate(moment[rows, columns], x[:, rows], x[:, columns])


def _by_rows(x: Tensor) -> Tensor:
    """``x`` [n, cols] with the numbers of a row side by side, and no row within another."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _leading_dimension(x: Tensor) -> int:
    """Numbers from row to row; where there is one row torch may give any."""
    return max(x.stride(0), x.shape[1])
