"""Super-blocks: scales that are whole multiples of one number for 256 columns, as Q3_K and Q6_K have them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import srcr
from srcr.errors import InputError
from srcr.formats import get_format
from srcr.formats.gguf.blocks import BY_NAME, GROUP, block_type, pack_blocks, unpack_blocks
from srcr.formats.native import decode, encode
from srcr.formats.verify import verify_tensors
from srcr.numerics.compressed import CompressedWeight
from srcr.numerics.descent import Descent, refine
from srcr.numerics.grid import GridSpec, code_range
from srcr.numerics.hessian import DampedHessian
from srcr.numerics.obs import SweepResult
from srcr.numerics.scales import fit_grid
from srcr.numerics.super_blocks import SUPER_BLOCK
from srcr.plans.plan import CompressionPlan, LayerPlan
from srcr.recovery.latent import LatentWeight
from srcr.storage.layout import GGUF
from srcr.testing.checkpoints import compressed_checkpoint
from srcr.testing.families import save_tiny_model, tiny_model

gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("srcr.engines.llama_cpp")
FORMAT = get_format("gguf")
#: Widths that 256 divides, but for the attention's output.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 32}
WIDE |= {"num_key_value_heads": 2}
KINDS = [(2, 6), (3, 6), (6, 8)]
#: What rounding activations to 8 bits does to logits, relative in norm.
ROUNDED = 3e-2


def spec_of(bits, scale_bits):
    return GridSpec(bits, GROUP, True, torch.float16, torch.float32, scale_bits)


def quantized(rows, blocks, bits, scale_bits, seed, zeros=0.25):
    """A random weight on a grid that was fitted to it, some of it pruned, a group of it zeros."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, blocks * SUPER_BLOCK, generator=generator)
    W *= torch.exp(torch.randn(rows, 1, generator=generator))
    W[:, :GROUP] = 0
    grid = fit_grid(W, spec_of(bits, scale_bits))
    codes = grid.expand().quantize(W)
    codes[torch.rand(W.shape, generator=generator) < zeros] = 0
    return W, CompressedWeight(None, 0.0, codes.to(torch.int8), grid)


@given(
    rows=st.integers(1, 4),
    blocks=st.integers(1, 3),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 99),
)
def test_ggml_reads_what_was_packed(rows, blocks, kind, seed):
    _, weight = quantized(rows, blocks, *kind, seed)
    data, stored = pack_blocks(weight), block_type(*kind)
    values = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[stored.name])
    assert np.array_equal(values, weight.dequantize().numpy())
    assert data.nbytes == rows * blocks * stored.size
    again = unpack_blocks(data, stored)
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.grid.scale, weight.grid.scale)
    assert torch.equal(again.dequantize(), weight.dequantize())


@given(data=st.binary(min_size=210, max_size=210), name=st.sampled_from(["Q3_K", "Q6_K"]))
def test_every_block_of_ggml_reads_back(data, name):
    """Whatever bits, its scale aside: unpacked and packed again they are the same."""
    kind = BY_NAME[name]
    block = np.frombuffer(data, np.uint8)[None, : kind.size].copy()
    block[0, -2:] = np.frombuffer(np.float16(0.37).tobytes(), np.uint8)
    weight = unpack_blocks(block, kind)
    expected = gguf.quants.dequantize(block, gguf.GGMLQuantizationType[name])
    assert np.array_equal(weight.dequantize().numpy(), expected)
    assert np.array_equal(pack_blocks(weight), block)


@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 99))
def test_scales_are_multiples_in_range(kind, seed):
    W, weight = quantized(3, 2, *kind, seed, zeros=0)
    multiples, (lowest, highest) = weight.grid.multiples(), code_range(kind[1])
    units = weight.grid.super_scale.repeat_interleave(SUPER_BLOCK // GROUP, dim=1)
    assert torch.equal(multiples * units, weight.grid.scale)
    assert multiples.min() >= lowest
    assert multiples.max() <= highest
    assert not bool((multiples == 0).any())
    assert torch.equal(weight.grid.super_scale.half().float(), weight.grid.super_scale)
    free = fit_grid(W, GridSpec(kind[0], GROUP, True, torch.float32))
    errors = [
        (grid.dequantize(grid.expand().quantize(W)) - W).square().sum()
        for grid in (weight.grid, free)
    ]
    assert errors[0] <= 1.1 * errors[1]


@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 30))
def test_refinement_keeps_multiples_and_loses_nothing(kind, seed):
    W, weight = quantized(3, 1, *kind, seed)
    X = torch.randn(400, W.shape[1], generator=torch.Generator().manual_seed(seed))
    damped = DampedHessian(X.T @ X, 1.0)
    codes, mask = weight.codes.float(), weight.codes != 0
    start = SweepResult(weight.dequantize(), codes.clone(), mask)
    result = refine(start, W, damped, weight.grid, Descent(2))
    matrix = damped.matrix + damped.damp * torch.eye(W.shape[1])

    def error(values):
        return float((((W - values) @ matrix) * (W - values)).sum())

    assert error(result.weights.weight) <= error(start.weight) * (1 + 1e-5)
    assert torch.equal(result.grid.super_scale, weight.grid.super_scale)
    assert torch.equal(result.grid.rounding()(result.grid.scale), result.grid.scale)
    assert torch.equal(result.grid.dequantize(result.weights.codes), result.weights.weight)
    assert not result.weights.weight[~mask].any()


@pytest.mark.parametrize("kind", KINDS)
def test_kept_between_steps_bit_for_bit(kind):
    _, weight = quantized(3, 2, *kind, 0)
    again = decode(encode(weight))
    assert torch.equal(again.grid.scale, weight.grid.scale)
    assert torch.equal(again.grid.super_scale, weight.grid.super_scale)
    assert (again.grid.scale_bits, again.grid.dtype) == (kind[1], torch.float16)
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert np.array_equal(pack_blocks(again), pack_blocks(weight))


def test_training_moves_scales_by_whole_multiples():
    _, weight = quantized(3, 2, 3, 6, 0)
    latent = LatentWeight.of(weight)
    latent.log_gain.add_(0.1)
    result = latent.result()
    assert torch.equal(result.grid.super_scale, weight.grid.super_scale)
    assert torch.equal(result.grid.rounding()(result.grid.scale), result.grid.scale)
    assert not torch.equal(result.grid.scale, weight.grid.scale)
    pack_blocks(result)


@pytest.mark.parametrize("bits", [2, 3, 6])
@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_llama_cpp_computes_what_transformers_does(tmp_path, family, bits):
    if (reason := llama_cpp.ENGINE.unavailable()) is not None:
        pytest.skip(reason)
    changes = WIDE | ({"query_pre_attn_scalar": 32} if family == "gemma3" else {})
    changes = {k: v for k, v in changes.items() if family != "phi3" or k != "head_dim"}
    recipe = srcr.Recipe(srcr.PruneSpec("magnitude", 0.25), srcr.QuantSpec("rtn", bits))
    checkpoint = compressed_checkpoint(tiny_model(family, **changes), recipe, FORMAT)
    FORMAT.check(checkpoint.contents)
    FORMAT.write(checkpoint, tmp_path)
    written = verify_tensors(FORMAT, checkpoint, tmp_path)
    kinds = {scheme.scale_bits for scheme in written.contents.schemes.values()}
    assert block_type(bits, 8 if bits == 6 else 6).scale_bits in kinds
    ids = torch.arange(3, 45)[None] * 7 % 96
    with torch.no_grad():
        expected = checkpoint.dequantized(torch.float32)(ids, use_cache=False).logits
    given = llama_cpp.ENGINE.logits(tmp_path, ids)
    assert float((given - expected).norm() / expected.norm()) < ROUNDED


def test_from_the_model_to_every_format_and_back(tmp_path):
    pytest.importorskip("constriction")
    base = save_tiny_model(tmp_path / "base", "llama", torch.bfloat16, **WIDE | {"head_dim": 64})
    ids = srcr.Tokens.of(torch.arange(4 * 40).view(4, 40) * 7 % 96)
    options = srcr.RunOptions(0, quiet=True)
    recipe = srcr.Recipe(srcr.PruneSpec(sparsity=0.2), srcr.QuantSpec(num_bits=3))
    small, plain = tmp_path / "k", tmp_path / "32"
    srcr.compress(base, srcr.Output(small, format="gguf"), recipe, ids, options)
    in_blocks = srcr.Recipe(recipe.prune, srcr.QuantSpec(num_bits=3, group_size=32))
    srcr.compress(base, srcr.Output(plain, format="gguf"), in_blocks, ids, options)
    sizes = [(folder / GGUF).stat().st_size for folder in (small, plain)]
    assert sizes[0] < sizes[1]
    srcr.export(small, srcr.Output(tmp_path / "archive", format="archive"), options)
    srcr.export(tmp_path / "archive", srcr.Output(tmp_path / "again", format="gguf"), options)
    assert (tmp_path / "again" / GGUF).read_bytes() == (small / GGUF).read_bytes()
    srcr.export(small, srcr.Output(tmp_path / "dense", format="dense"), options)
    with pytest.raises(InputError, match=r"those of .* are multiples .*--format dense"):
        srcr.export(small, srcr.Output(tmp_path / "ct", format="compressed-tensors"), options)
    tokens = ids.input_ids[:, :20]
    with torch.no_grad():
        logits = [srcr.load(tmp_path / name)(tokens).logits for name in ("k", "archive", "dense")]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale_bits": 9, "group_size": 16}, "scale_bits 9 is out of range: 2 to 8"),
        ({"scale_bits": 6}, "a group_size that divides 256, not auto"),
        ({"scale_bits": 6, "group_size": 24}, "a group_size that divides 256, not 24"),
        ({"scale_bits": 6, "group_size": 16, "symmetric": False}, "not zero-points"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(InputError, match=message):
        srcr.QuantSpec(num_bits=3, **settings)


def test_super_blocks_that_ggml_does_not_have(tmp_path):
    model = tiny_model("llama", **WIDE)
    for quant, message in (
        (srcr.QuantSpec("rtn", 4, 16, scale_bits=6), "has 4 bits, scale_bits 6 and group_size 16"),
        (srcr.QuantSpec("rtn", 3, 32, scale_bits=6), "has 3 bits, scale_bits 6 and group_size 32"),
    ):
        layers = (LayerPlan("model.layers.0.self_attn.q_proj", None, quant),)
        checkpoint = compressed_checkpoint(model, CompressionPlan(layers), FORMAT)
        with pytest.raises(InputError, match=message):
            FORMAT.check(checkpoint.contents)
    layers = (
        LayerPlan(
            "model.layers.0.self_attn.o_proj", None, srcr.QuantSpec("rtn", 3, 16, scale_bits=6)
        ),
    )
    with pytest.raises(InputError, match=r"a width that 256 divides, and that of .* is 128"):
        compressed_checkpoint(model, CompressionPlan(layers), FORMAT)
