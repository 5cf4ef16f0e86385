"""What a run computes by: chosen by the CPU's features, as far as its environment leaves them."""

import json
import os
import subprocess
import sys

import pytest
import torch

from srcr import environment
from srcr.numerics.grid import Grid
from srcr.numerics.kernels import cpu_moments, dispatch, mkl_moments
from srcr.numerics.paths import compute_paths

#: A CPU with AVX2 and nothing newer.
PLAIN = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "NUMBA_CPU_FEATURES": "+avx2,+fma",
}
PRINT = """
import json, torch
from srcr.environment import multiplies_bfloat16
from srcr.models.blockwise import running_precision
from srcr.numerics.kernels.cpu_moments import available
from srcr.numerics.paths import compute_paths
running = running_precision(torch.bfloat16, torch.device("cpu"))
print(json.dumps([compute_paths(torch.device("cpu"), running), available()]))
"""


@pytest.mark.slow
def test_a_plain_cpu_computes_in_float32():
    process = subprocess.run(
        [sys.executable, "-c", PRINT],
        env={**os.environ, **PLAIN},
        capture_output=True,
        text=True,
        check=True,
    )
    paths, instruction = json.loads(process.stdout)
    assert paths["vectors"] in ("AVX2", "DEFAULT")
    assert (paths["blocks"], paths["moments"], paths["products"]) == ("float32", "float32", "BLAS")
    assert not instruction
    assert paths["device"] == environment.cpu_name()
    assert int(paths["threads"]) >= 1


@pytest.mark.parametrize(("intel", "module"), [(True, mkl_moments), (False, cpu_moments)])
def test_moments_in_bfloat16_by_what_the_cpu_has(monkeypatch, intel, module):
    monkeypatch.setattr(dispatch, "is_intel", lambda: intel)
    for there, moments in ((True, f"bfloat16 by {module.ENGINE}"), (False, "float32")):
        monkeypatch.setattr(module, "available", lambda there=there: there)
        assert compute_paths(torch.device("cpu"), torch.bfloat16)["moments"] == moments


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [4, 12])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_product_rounded_once_is_that_in_16_bits(dtype, group_size, symmetric):
    """For every code, and scales of every size, the smallest and the largest too."""
    generator = torch.Generator().manual_seed(0)
    info = torch.finfo(dtype)
    scale = torch.randn(400, 12 // group_size, generator=generator).ldexp(
        torch.arange(400)[:, None] % 40 - 24
    )
    scale[:2] = torch.tensor([info.tiny, info.max / 300])[:, None]
    scale = scale.to(dtype).to(torch.float32)
    zero = torch.randint(-128, 128, scale.shape, generator=generator).float()
    grid = Grid(scale, None if symmetric else zero, 8, group_size, dtype)
    codes = torch.randint(-128, 128, (400, 12), generator=generator, dtype=torch.int8)
    steps = codes.float() - (0 if symmetric else zero.repeat_interleave(group_size, 1))
    engine = steps.to(dtype) * scale.to(dtype).repeat_interleave(group_size, 1)
    weight = grid.dequantize(codes)
    assert torch.equal(weight, engine.float())
    assert not bool((weight.signbit() & (weight == 0)).any())
