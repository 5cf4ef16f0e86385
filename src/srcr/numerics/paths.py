"""Which implementations a run computes by: chosen by the features of the CPU, never by a measurement, so that
a run repeats its bytes (docs/decisions/005)."""

import torch

from srcr.environment import cpu_name
from srcr.numerics.kernels.dispatch import moments_for
from srcr.numerics.products import uses_onednn
from srcr.numerics.tensors import dtype_name


def compute_paths(device: torch.device, running: torch.dtype) -> dict[str, str]:
    """What computes, by what it is for: the ``device``, ``blocks`` the precision that blocks run in,
    and on a CPU ``products`` the library of float32 products, ``moments`` of the blocks' activations,
    ``vectors`` and ``threads`` of torch."""
    blocks = dtype_name(running)
    if device.type != "cpu":
        return {"device": torch.cuda.get_device_name(device), "blocks": blocks}
    compiled = moments_for(torch.empty(0, dtype=running))
    return {
        "device": cpu_name(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "blocks": blocks,
        "products": "oneDNN" if uses_onednn() else "BLAS",
        "moments": f"bfloat16 by {compiled.ENGINE}" if compiled else "float32",
    }
