"""Latent numbers: what the model holds is what an engine computes, zeros stay, gradients are autograd's."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from srcr.numerics.compressed import CompressedWeight
from srcr.numerics.grid import Grid, code_range, round_to_storage
from srcr.recovery.latent import LatentWeight


@st.composite
def compressed(draw):
    """A quantized weight, with and without zero-points, groups and a mask."""
    bits, symmetric = draw(st.integers(2, 8)), draw(st.booleans())
    rows, groups, size = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 6))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    lowest, highest = code_range(bits)
    cols = groups * size

    def codes(*shape):
        return torch.randint(lowest, highest + 1, shape, generator=generator)

    scale = round_to_storage(0.01 + torch.rand(rows, groups, generator=generator), dtype)
    zero = None if symmetric else codes(rows, groups).float()
    grid = Grid(scale, zero, bits, size, dtype)
    values = codes(rows, cols)
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(rows, cols, generator=generator) < 0.7
        pruned = torch.zeros(rows, cols) if zero is None else zero.repeat_interleave(size, 1)
        values = torch.where(mask, values, pruned.long())
    return CompressedWeight(mask, 0.0, values.to(torch.int8), grid)


def written(latent):
    weight = torch.empty(latent.steps.shape)
    latent.write(weight)
    return weight


@given(compressed(), st.booleans())
def test_they_begin_at_the_weight_that_came(weight, near):
    original = 3 * torch.randn(weight.shape) if near else None
    latent = LatentWeight.of(weight, original)
    assert torch.equal(written(latent), weight.dequantize())
    result = latent.result()
    assert torch.equal(result.codes, weight.codes)
    assert torch.equal(result.grid.scale, weight.grid.scale)
    assert result.grid.scale.data_ptr() != weight.grid.scale.data_ptr()


@given(compressed(), st.integers(0, 1000))
def test_whatever_training_does_zeros_stay_and_codes_stay_in_range(weight, seed):
    latent = LatentWeight.of(weight)
    generator = torch.Generator().manual_seed(seed)
    latent.steps.add_(20 * torch.randn(latent.steps.shape, generator=generator))
    latent.log_gain.add_(torch.randn(latent.log_gain.shape, generator=generator))
    latent.clamp_()
    result = latent.result()
    lowest, highest = code_range(weight.grid.num_bits)
    assert int(result.codes.min()) >= lowest
    assert int(result.codes.max()) <= highest
    assert torch.equal(written(latent), result.dequantize())
    if weight.mask is not None:
        assert not written(latent)[~weight.mask].any()
        assert result.mask is weight.mask
    if weight.grid.zero_point is not None:
        assert torch.equal(result.grid.zero_point, weight.grid.zero_point)


class StraightThrough(torch.autograd.Function):
    """Rounding whose gradient is 1."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@given(compressed())
def test_gradients_are_those_of_autograd_through_the_rounding(weight):
    original = weight.dequantize() + 0.3 * weight.grid.scale.repeat_interleave(
        weight.grid.group_size, 1
    )
    latent = LatentWeight.of(weight, original)
    gradient = torch.randn(weight.shape)
    steps = latent.steps.clone().requires_grad_()
    gain = latent.log_gain.clone().requires_grad_()
    codes = StraightThrough.apply(steps)
    if weight.mask is not None:
        codes = codes * weight.mask
    scale = (latent.start * gain.exp()).repeat_interleave(weight.grid.group_size, 1)
    (codes * scale * gradient).sum().backward()
    latent.gradients(gradient.clone())
    assert torch.allclose(latent.steps.grad, steps.grad, atol=1e-5)
    assert torch.allclose(latent.log_gain.grad, gain.grad, rtol=1e-3, atol=1e-4)


def test_weights_without_a_grid_are_trained_as_they_are():
    values = torch.randn(3, 8).to(torch.bfloat16)
    mask = torch.rand(3, 8) < 0.5
    values = values * mask
    latent = LatentWeight.of(CompressedWeight(mask, 0.0, values=values))
    assert torch.allclose(written(latent), values.float(), rtol=1e-2)
    gradient = torch.ones(3, 8)
    latent.gradients(gradient)
    assert torch.equal(latent.steps.grad != 0, mask)
    assert latent.log_gain.grad is None
    latent.steps.add_(1.0)
    result = latent.result()
    assert result.values.dtype == torch.bfloat16
    assert torch.equal(result.dequantize(), written(latent))
    assert not result.dequantize()[~mask].any()
