"""Products of float32 matrices, by the faster of the two libraries that torch has on a CPU."""

from functools import cache

import torch
from torch import Tensor

from srcr.environment import is_intel

#: Where a side is shorter, setting out takes longer than the product.
SHORT = 64


@cache
def uses_onednn() -> bool:
    """Whether oneDNN multiplies float32 here: it compiles its own code for AVX-512, which MKL, what torch
    takes otherwise, uses on Intel's CPUs alone, where it is a little faster (docs/decisions/005)."""
    return (
        bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and not is_intel()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def product(A: Tensor, B: Tensor) -> Tensor:
    """``A @ B`` for matrices [m, k] and [k, n] of one type."""
    suits = A.dtype == torch.float32 and A.device.type == "cpu" and uses_onednn()
    if not suits or min(*A.shape, B.shape[1]) < SHORT:
        return A @ B
    if not (B.is_contiguous() or B.T.is_contiguous()):
        B = B.contiguous()
    result: Tensor = torch.ops.mkldnn._linear_pointwise(A.contiguous(), B.T, None, "none", [], "")
    return result
