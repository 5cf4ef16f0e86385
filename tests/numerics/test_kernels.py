"""The compiled steps against the reference in PyTorch: Numba on layers of realistic size, Triton on a GPU
where there is one, and on a CPU in its interpreter, on small layers."""

import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from layers import grid_of
from srcr.numerics import cholesky, hessian, masks, obs, saliency
from srcr.numerics.descent import Descent, refine, step_columns
from srcr.numerics.grid import Grid, GridSpec
from srcr.numerics.hessian import DampedHessian
from srcr.numerics.kernels import cpu, cpu_scales
from srcr.numerics.kernels.dispatch import Kernels, kernels_for, scale_search_for
from srcr.numerics.scales import ERROR_NORM, SHRINKS, search_scales

pytestmark = pytest.mark.usefixtures("two_threads")
#: Triton looks at this when it is imported, so the interpreter has a process of its own.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
TRITON = find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not TRITON, reason="Triton is not installed")


@dataclass(frozen=True)
class Way:
    """Kernels, where they run, and the layer to try them on."""

    kernels: Kernels
    device: str
    rows: int
    cols: int
    block_size: int


@pytest.fixture(params=["numba", "gpu", "interpreter"])
def way(request):
    if request.param == "numba":
        return Way(cpu, "cpu", 96, 320, 128)
    if not TRITON:
        pytest.skip("Triton is not installed")
    if request.param == "gpu" and (INTERPRETING or not torch.cuda.is_available()):
        pytest.skip("no GPU here")
    if request.param == "interpreter" and not INTERPRETING:
        pytest.skip("see test_triton_is_the_reference_in_its_interpreter")
    from srcr.numerics.kernels import cuda

    if request.param == "gpu":
        return Way(cuda, "cuda", 96, 320, 128)
    return Way(cuda, "cpu", 14, 32, 16)


def layer(seed, way):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(way.cols, way.cols, generator=generator) / way.cols**0.5
    X = torch.randn(4 * way.cols, way.cols, generator=generator) @ (mix + torch.eye(way.cols))
    W = torch.randn(way.rows, way.cols, generator=generator)
    return W.to(way.device), (X.T @ X).to(way.device)


def selection(kind, factor, way):
    pivots = factor.upper.diagonal()
    if kind == "2:4":
        return obs.MaskSelection(
            lambda w, at: masks.n_of_m_mask(saliency.obs(w, pivots[at]), 2, 4), 4
        )
    if kind is None:
        return None

    def select(w, at):
        return masks.prune_lowest(saliency.obs(w, pivots[at]), w.numel() // 3)

    return obs.MaskSelection(select, way.block_size, propagate=kind == "pushed")


def assert_alike(ours, theirs, grid):
    """The same but for what a last bit may tip: a rounding tie, and what follows from it in its row."""
    same = torch.ones(len(ours.weight), dtype=torch.bool, device=ours.weight.device)
    if theirs.mask is not None:
        assert (ours.mask == theirs.mask).float().mean() > 0.999
        same &= (ours.mask == theirs.mask).all(1)
    if theirs.codes is not None:
        same &= (ours.codes == theirs.codes).all(1)
    assert same.float().mean() > 0.9
    torch.testing.assert_close(ours.weight[same], theirs.weight[same], rtol=1e-4, atol=1e-4)
    if grid is not None:
        dequantized = grid.expand().dequantize(ours.codes.float())
        assert torch.equal(dequantized, ours.weight), "the product is the engine's, to the bit"


def compare(way, kind, grid_of):
    """Sweep and descend with the kernels and with the reference."""
    W, H = layer(1, way)
    order = hessian.activation_order(H.diagonal(), 4)
    factor = cholesky.factorize(H, order)
    grid = grid_of(W, H)
    ours, theirs = (
        obs.sweep(W, factor, selection(kind, factor, way), grid, way.block_size, columns)
        for columns in (way.kernels.fix_columns, obs.fix_columns)
    )
    assert_alike(ours, theirs, grid)
    polished, expected = (
        refine(theirs, W, DampedHessian(H, factor.damp), grid, Descent(1, way.block_size), columns)
        for columns in (way.kernels.step_columns, step_columns)
    )
    assert_alike(polished.weights, expected.weights, polished.grid)


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "kind", "dtype"),
    [
        (4, None, True, None, torch.float32),
        (4, None, True, None, torch.bfloat16),
        (4, None, True, "pushed", torch.float16),
        (3, 16, False, "pushed", torch.float32),
        (3, 16, False, "pushed", torch.bfloat16),
        (3, 16, False, "pushed", torch.float16),
        (8, 8, False, "2:4", torch.bfloat16),
        (8, 8, False, "2:4", torch.float16),
        (2, None, True, "dropped", torch.float32),
        (2, None, True, "dropped", torch.bfloat16),
    ],
)
def test_kernels_are_the_reference(way, bits, group_size, symmetric, kind, dtype):
    size = group_size or way.cols
    compare(way, kind, lambda W, H: grid_of(W, bits, size, symmetric, dtype, H.diagonal()))


@pytest.mark.parametrize("kind", ["pushed", "dropped", "2:4"])
def test_kernels_are_the_reference_without_a_grid(way, kind):
    compare(way, kind, lambda W, H: None)


@pytest.mark.parametrize(
    ("rows", "cols", "block_size"), [(40, 24, 1), (40, 32, 12), (10, 56, 40), (3, 40, 1024)]
)
def test_blocks_of_any_size(way, rows, cols, block_size):
    way = Way(way.kernels, way.device, rows, cols, block_size)
    compare(way, "dropped", lambda W, H: grid_of(W, 3, 8, False, torch.bfloat16, H.diagonal()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_ties_and_products_to_the_bit(way, dtype, symmetric):
    """Weights half-way between codes, or far outside them, with nothing to push on."""
    generator = torch.Generator().manual_seed(0)
    rows, cols = 40, 48
    scale = torch.randn(rows, 2, generator=generator).ldexp(torch.arange(-12, 8).repeat(2)[:, None])
    zero = torch.randint(-8, 8, (rows, 2), generator=generator).float()
    grid = Grid(
        scale.to(dtype).float().to(way.device), None if symmetric else zero.to(way.device),
        4, cols // 2, dtype,
    )  # fmt: skip
    halves = torch.arange(-24, 24) / 2
    halves[[0, -1]] = torch.tensor([-3e9, 3e9])
    W = (halves[None] * grid.scale.cpu().repeat_interleave(cols // 2, 1)).to(way.device)
    eye, ones = torch.eye(cols, device=way.device), torch.ones(cols, device=way.device)
    factor = cholesky.CholeskyFactor(eye, torch.arange(cols, device=way.device), ones, 0.0, 0.0)
    ours, theirs = (
        obs.sweep(W, factor, None, grid, way.block_size, columns)
        for columns in (way.kernels.fix_columns, obs.fix_columns)
    )
    assert torch.equal(ours.codes, theirs.codes)
    assert torch.equal(ours.weight, theirs.weight)
    assert not torch.signbit(ours.weight[ours.weight == 0]).any()
    assert {-8, 7} <= set(ours.codes.flatten().tolist())


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(INTERPRETING, reason="this is the interpreter")
def test_triton_is_the_reference_in_its_interpreter():
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-k", "interpreter and not in_its"]
    ran = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "skipped" not in ran.stdout
    assert " passed" in ran.stdout


class Recorder:
    """Stands in for a kernel and notes what it would be launched with."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((args, options))


def compile_ahead(kernel, arguments, options, capability):
    """Compile a kernel as a launch would, for a GPU that need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {torch.float32: "*fp32", torch.int8: "*i8", torch.bool: "*i1", torch.int64: "*i64"}
    kinds, constants, settings = {}, {}, {}
    for name, value in zip(kernel.arg_names, arguments, strict=False):
        if isinstance(value, torch.Tensor):
            kinds[name] = pointers[value.dtype]
        elif value is None:
            constants[name] = value
        else:
            kinds[name] = "i32" if isinstance(value, int) else "fp32"
    for name, value in options.items():
        (constants if name in kernel.arg_names else settings)[name] = value
    source = ASTSource(
        kernel, {name: kinds.get(name, "constexpr") for name in kernel.arg_names}, constants
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=settings)


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(INTERPRETING, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "symmetric", "kind", "block_size"),
    [
        (torch.bfloat16, True, "pushed", 128),
        (torch.float16, False, "dropped", 128),
        (torch.float32, True, None, 100),
        (None, None, "2:4", 128),
        (torch.bfloat16, False, "pushed", 2048),
    ],
)
def test_triton_compiles_without_a_gpu(
    monkeypatch, tmp_path, capability, dtype, symmetric, kind, block_size
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from srcr.numerics.kernels import cuda

    sweep, descent = Recorder(cuda._sweep), Recorder(cuda._descend)
    monkeypatch.setattr(cuda, "_sweep", sweep)
    monkeypatch.setattr(cuda, "_descend", descent)
    way = Way(cuda, "cpu", 8, max(block_size, 128), block_size)
    W, H = torch.randn(way.rows, way.cols), torch.eye(way.cols)
    factor = cholesky.factorize(H)
    grid = None if dtype is None else grid_of(W, 4, way.cols, symmetric, dtype, search=False)
    swept = obs.sweep(W, factor, selection(kind, factor, way), grid, block_size, cuda.fix_columns)
    refine(swept, W, DampedHessian(H, 0.01), grid, Descent(1, block_size), cuda.step_columns)
    for recorder in (sweep, descent):
        compiled = compile_ahead(recorder.kernel, *recorder.launches[0], capability)
        assert len(compiled.asm["cubin"]) > 1000
        # 1.5 * 2^23 is added and taken away again: no compiler may find that superfluous
        assert ("0f4B400000" in compiled.asm["ptx"]) == (grid is not None)
        assert ("0fCB400000" in compiled.asm["ptx"]) == (grid is not None)


def test_which_device_has_kernels(monkeypatch):
    assert kernels_for(torch.device("cpu")) is cpu
    assert kernels_for(torch.device("meta")) is None
    assert scale_search_for(torch.device("cpu")) is cpu_scales.search_scales
    assert scale_search_for(torch.device("meta")) is None
    monkeypatch.setitem(sys.modules, "triton", None)
    assert kernels_for(torch.device("cuda")) is None, "the reference has to do without Triton"


@needs_triton
def test_a_gpu_has_kernels_where_triton_is():
    from srcr.numerics.kernels import cuda

    assert kernels_for(torch.device("cuda")) is cuda


@pytest.mark.skipif(INTERPRETING or not torch.cuda.is_available(), reason="no GPU here")
@needs_triton
def test_a_gpu_finds_what_the_cpu_finds():
    """By the way that compress takes: the kernels that the device has."""
    on_cpu = Way(cpu, "cpu", 96, 320, 128)
    W, H = layer(1, on_cpu)
    factor = cholesky.factorize(H, hessian.activation_order(H.diagonal(), 4))
    grid = grid_of(W, 4, 64, False, torch.bfloat16, H.diagonal())
    theirs = obs.sweep(W, factor, selection("2:4", factor, on_cpu), grid)
    gpu = torch.device("cuda")
    there = cholesky.CholeskyFactor(
        factor.upper.to(gpu), factor.order.to(gpu), factor.diagonal.to(gpu),
        factor.damp, factor.dampening_frac,
    )  # fmt: skip
    scale, zero = grid.scale.to(gpu), grid.zero_point.to(gpu)
    grid = Grid(scale, zero, grid.num_bits, grid.group_size, grid.dtype)
    ours = obs.sweep(W.to(gpu), there, selection("2:4", there, on_cpu), grid)
    codes, mask = ours.codes.cpu(), ours.mask.cpu()
    assert (codes == theirs.codes).float().mean() > 0.99
    assert (mask == theirs.mask).float().mean() > 0.99
    errors = [hessian.output_error(swept.weight.cpu() - W, H) for swept in (ours, theirs)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)


@pytest.mark.parametrize(("dtype", "product"), [(torch.bfloat16, 1), (torch.float16, 2)])
def test_products_are_rounded_as_torch_does(dtype, product):
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-30, 17, (20_000,), generator=generator)
    values = torch.randn(20_000, generator=generator).ldexp(exponents)
    halfway = torch.arange(-4096, 4096) * 2.0**-4  # many ties
    special = torch.tensor([0.0, -0.0, 65504.0, 65519.0, 65520.0, -7e4, 2.0**-24, 2.0**-25, 3e-8])
    values = torch.cat([values, halfway, halfway * 2.0**-20, special])
    if product == 1:
        values = values[values.abs() < 1e38]
    ours = np.array([cpu._rounded(np.float32(v), product) for v in values.numpy()], np.float32)
    theirs = values.to(dtype).to(torch.float32) + 0.0
    np.testing.assert_array_equal(ours, theirs.numpy())
    assert not np.signbit(ours[ours == 0]).any()


def test_threads_are_those_of_torch():
    import numba

    before = torch.get_num_threads()
    W, H = layer(2, Way(cpu, "cpu", 96, 320, 128))
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            obs.sweep(W, cholesky.factorize(H))
            assert numba.get_num_threads() == torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def search_loss(grid, W, mask, importance):
    """The scale search's own measure of each group, in float64."""
    column = grid.expand()
    if mask is not None:
        alive = mask.view(len(W), -1, grid.group_size)
        alive = (alive | ~alive.any(2, keepdim=True)).view_as(W)
        W = torch.where(alive, W, torch.zeros(()))
    error = (column.dequantize(column.quantize(W)) - W).double().abs() ** ERROR_NORM
    if importance is not None:
        error = error * importance.double()
    return error.view(len(W), -1, grid.group_size).sum(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "group", "pruned", "weighed"),
    [(2, 5, 0.9, True), (3, 64, 0.3, False), (4, 320, 0.25, True), (8, 32, None, True)],
)
def test_scales_are_those_of_the_reference(dtype, symmetric, bits, group, pruned, weighed):
    W, H = layer(3, Way(cpu, "cpu", 96, 320, 128))
    W[5] = 0
    W[:, 7] *= 20
    mask = None if pruned is None else torch.rand_like(W) >= pruned
    importance = H.diagonal() if weighed else None
    ours, theirs = (
        search(W, GridSpec(bits, group, symmetric, dtype), importance, mask, SHRINKS)
        for search in (cpu_scales.search_scales, search_scales)
    )
    same = ours.scale == theirs.scale
    if not symmetric:
        same &= ours.zero_point == theirs.zero_point
    assert same.float().mean() > 0.99, "only tries whose losses tie may change places"
    losses = [search_loss(grid, W, mask, importance) for grid in (ours, theirs)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-12)
    assert torch.equal(losses[0][same], losses[1][same])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [3e-5, 1e-5, 1e-7])
def test_subnormal_scales_are_those_of_the_reference(symmetric, bits, size):
    W = torch.randn(64, 64, generator=torch.Generator().manual_seed(5)) * size
    ours, theirs = (
        search(W, GridSpec(bits, 16, symmetric, torch.float16), None, None, SHRINKS)
        for search in (cpu_scales.search_scales, search_scales)
    )
    assert theirs.scale.abs().min() < torch.finfo(torch.float16).tiny
    assert (ours.scale == theirs.scale).float().mean() > 0.99
    losses = [search_loss(grid, W, None, None) for grid in (ours, theirs)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 6e4), (torch.bfloat16, 1e30)])
def test_losses_that_overflow_are_as_in_the_reference(symmetric, dtype, size):
    W = torch.randn(8, 64, generator=torch.Generator().manual_seed(4)).clamp(-1, 1) * size
    ours, theirs = (
        search(W, GridSpec(4, 16, symmetric, dtype), None, None, SHRINKS)
        for search in (cpu_scales.search_scales, search_scales)
    )
    assert torch.equal(ours.scale, theirs.scale)


def test_powers_are_within_a_millionth():
    exponents = np.linspace(-52, 52, 200_001)  # beyond, the result is out of float32's range
    x = np.concatenate([np.exp2(exponents), 1 + np.linspace(0, 1, 50_001)]).astype(np.float32)
    out = np.empty_like(x)
    cpu_scales.powers(x, x.view(np.int32), np.uint64(x.size), out)
    np.testing.assert_allclose(out, x.astype(np.float64) ** ERROR_NORM, rtol=1e-6)
    edges = np.array([0, 1e-45, 1e-38, 3e38, np.inf], np.float32)
    cpu_scales.powers(edges, edges.view(np.int32), np.uint64(4), out)
    assert out[:4].tolist() == [0, 0, 0, np.inf]


def test_a_scale_does_not_depend_on_other_rows_or_threads():
    W, H = layer(5, Way(cpu, "cpu", 96, 320, 128))
    settings = GridSpec(4, 64, True, torch.bfloat16), H.diagonal(), None, SHRINKS
    assert torch.get_num_threads() == 2
    whole = cpu_scales.search_scales(W, *settings).scale
    part = cpu_scales.search_scales(W[11:14].contiguous(), *settings)
    assert torch.equal(part.scale, whole[11:14])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(cpu_scales.search_scales(W, *settings).scale, whole)
    finally:
        torch.set_num_threads(before)
