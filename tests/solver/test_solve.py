"""solve(): pruner and quantizer put together, in one pass and in sequence."""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from srcr.errors import InputError, NumericalError
from srcr.methods import pruners, quantizers
from srcr.numerics.hessian import LayerStatistics, output_error
from srcr.numerics.sparsity import count_pruned
from srcr.plans.plan import LayerPlan
from srcr.plans.specs import PruneSpec, QuantSpec, SolverSpec
from srcr.solver.problem import LayerProblem
from srcr.solver.solve import solve

MODES = ["joint", "sequential-a", "sequential-b"]
COLS = 16
ROWS = {"q": 6, "k": 3, "v": 3}


def inputs(seed, cols=COLS, tokens=64):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=generator)
    X = torch.randn(tokens, cols, generator=generator) @ mix
    return X * torch.logspace(-0.5, 0.5, cols)[torch.randperm(cols, generator=generator)]


@dataclass(frozen=True)
class Moments:
    """Of the inputs that linears share: the Hessian, ``cross`` X_d^T X with the dense model's inputs, and the
    Hessian of the tokens that the dense model saw, where those are not all."""

    hessian: torch.Tensor
    cross: torch.Tensor | None = None
    paired: torch.Tensor | None = None


def moments(X, X_dense=None):
    return Moments(X.T @ X, None if X_dense is None else X_dense.T @ X)


def compress_group(weights, stats, plans, spec, dtype=torch.float32, by_inputs=False):
    """The compressed linears of a group by name; what the solver takes is made for it, ``by_inputs`` of the
    cross moments those of the inputs alone."""
    cross = None
    if by_inputs:
        statistics = LayerStatistics(stats.hessian, None, stats.paired, stats.cross.clone())
        return solve(LayerProblem(weights, plans, statistics, spec, dtype))
    if stats.cross is not None:
        cross = {name: W @ stats.cross for name, W in weights.items()}
    statistics = LayerStatistics(stats.hessian, cross, stats.paired)
    return solve(LayerProblem(weights, plans, statistics, spec, dtype))


def weight(seed, rows=6, cols=COLS):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def compress(W, stats, prune=None, quant=None, spec=None, dtype=torch.float32):
    """One linear alone."""
    plans = {"layer": LayerPlan("layer", prune, quant)}
    return compress_group({"layer": W}, stats, plans, spec or SolverSpec(), dtype)["layer"]


def group_weights(seed=0):
    return {name: weight(seed + i, rows) for i, (name, rows) in enumerate(ROWS.items())}


def assert_exact(result, sparsity):
    """Counts, zeros and codes of one compressed linear."""
    out = result.dequantize()
    assert bool(torch.isfinite(out).all())
    if sparsity == 0:
        assert result.mask is None
    else:
        assert int((~result.mask).sum()) == count_pruned(sparsity, out.numel())
        assert bool((out[~result.mask] == 0).all())
    assert sparsity != 0 or result.codes is not None
    if result.codes is not None:
        assert torch.equal(result.grid.expand().dequantize(result.codes.float()), out)
        half = 2 ** (result.grid.num_bits - 1)
        assert -half <= int(result.codes.min()) <= int(result.codes.max()) < half


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("quant", [None, *quantizers()])
@pytest.mark.parametrize("prune", pruners())
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_combination_is_exact_for_each_linear_of_a_group(prune, quant, mode, symmetric):
    sparsities = {"q": 0.3, "k": 0.55, "v": 0.0}
    quantized = QuantSpec(quant, 3, 8, symmetric) if quant else None
    plans = {n: LayerPlan(n, PruneSpec(prune, s), quantized) for n, s in sparsities.items()}
    X = inputs(1)
    stats = moments(X, X + 0.1 * inputs(2))
    results = compress_group(
        group_weights(), stats, plans, SolverSpec(mode, block_size=5), torch.float32
    )
    assert list(results) == (["q", "k", "v"] if quant else ["q", "k"])
    for name, result in results.items():
        assert result.dequantize().shape == (ROWS[name], COLS)
        assert_exact(result, sparsities[name])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("quant", [None, *quantizers()])
@pytest.mark.parametrize("prune", pruners())
@pytest.mark.parametrize("actorder", ["static", None])
def test_patterns_hold_in_every_combination(prune, quant, mode, actorder):
    quantized = QuantSpec(quant, 4, 8, True, actorder) if quant else None
    for structure, (kept, group) in {"2:4": (2, 4), "6:8": (6, 8)}.items():
        spec = PruneSpec.of(prune, 0, structure)
        settings = SolverSpec(mode, block_size=6)  # a block that no group divides
        result = compress(weight(3), moments(inputs(3)), spec, quantized, settings)
        assert_exact(result, spec.sparsity)
        assert bool((result.mask.view(6, -1, group).sum(-1) == kept).all())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("quant", [None, *quantizers()])
@pytest.mark.parametrize("prune", [None, *pruners()])
def test_a_stack_gives_what_each_linear_gives_alone(prune, quant, mode):
    sparsities = {"q": 0.25, "k": 0.5, "v": 0.0}
    quantized = QuantSpec(quant, 3, 4) if quant else None
    plans = {
        n: LayerPlan(n, PruneSpec(prune, s) if prune else None, quantized)
        for n, s in sparsities.items()
    }
    X = inputs(4)
    stats = moments(X, X + 0.2 * inputs(5))
    weights, spec = group_weights(6), SolverSpec(mode, block_size=4)
    together = compress_group(weights, stats, plans, spec, torch.float32)
    for name in weights:
        alone = compress_group(
            {name: weights[name]}, stats, {name: plans[name]}, spec, torch.float32
        )
        assert (name in alone) == (name in together)
        if name not in alone:
            continue
        a, b = alone[name], together[name]
        assert (a.mask is None) == (b.mask is None)
        assert a.mask is None or torch.equal(a.mask, b.mask)
        same = slice(None)
        if (
            a.codes is not None
        ):  # the largest weight of rtn's range is a rounding tie: a bit decides
            same = a.codes == b.codes
            assert (~same).float().mean() < 0.02
        torch.testing.assert_close(a.dequantize()[same], b.dequantize()[same], rtol=1e-4, atol=1e-5)
        assert a.error == pytest.approx(b.error, rel=1e-2, abs=1e-9)


def test_different_treatments_in_one_group_weights():
    plans = {
        "q": LayerPlan("q", PruneSpec("sparsegpt", 0.5), QuantSpec(num_bits=4, group_size=8)),
        "k": LayerPlan("k", PruneSpec.of("wanda", 0, "2:4"), QuantSpec("rtn", 8, -1, False)),
        "v": LayerPlan("v", None, QuantSpec(num_bits=2, actorder=None)),
        "o": LayerPlan("o", PruneSpec("magnitude", 0.25), None),
        "untouched": LayerPlan("untouched"),
        "unpruned": LayerPlan("unpruned", PruneSpec("sparsegpt", 0.0), None),
    }
    weights = group_weights() | {name: weight(9, 4) for name in ("o", "untouched", "unpruned")}
    stats = moments(inputs(7))
    results = compress_group(weights, stats, plans, SolverSpec(), torch.float32)
    assert list(results) == ["q", "k", "v", "o"]
    assert [results[n].grid.num_bits for n in "qkv"] == [4, 8, 2]
    assert [results[n].grid.group_size for n in "qkv"] == [8, 16, 16]
    assert results["k"].grid.zero_point is not None
    assert results["o"].grid is None
    for name, result in results.items():
        assert_exact(result, plans[name].sparsity)
        alone = compress_group(
            {name: weights[name]}, stats, {name: plans[name]}, SolverSpec(), torch.float32
        )[name]
        torch.testing.assert_close(result.dequantize(), alone.dequantize())


def test_nothing_planned_gives_nothing():
    plans = {name: LayerPlan(name) for name in ROWS}
    assert (
        compress_group(group_weights(), moments(inputs(8)), plans, SolverSpec(), torch.float32)
        == {}
    )


@settings(max_examples=40)
@given(
    rows=st.integers(1, 5),
    cols=st.integers(1, 11),
    block=st.integers(1, 13),
    sparsity=st.floats(0.01, 0.99),
    prune=st.sampled_from(sorted(pruners())),
    mode=st.sampled_from(MODES),
    quantized=st.booleans(),
)
def test_counts_are_exact_whatever_the_shape(rows, cols, block, sparsity, prune, mode, quantized):
    quant = QuantSpec("gptq", 2) if quantized else None
    result = compress(
        weight(cols, rows, cols),
        moments(inputs(rows, cols)),
        PruneSpec(prune, sparsity),
        quant,
        SolverSpec(mode, block_size=block),
    )
    assert_exact(result, sparsity)


# --- against the slow reference -------------------------------------------------------------------


def reference_grid(grid):
    zero = None if grid.zero_point is None else grid.zero_point.double().numpy()
    return reference.Grid(grid.scale.double().numpy(), zero, grid.num_bits, grid.group_size)


class Problem:
    """A layer in float64 with its order, damping and target computed from first principles."""

    def __init__(self, seed, dense):
        X, noise = inputs(seed), inputs(seed + 1)
        X_dense = X + 0.2 * noise
        self.weight = weight(seed + 2, 5)
        self.stats = moments(X, X_dense if dense else None)
        self.W = self.weight.double().numpy()
        self.H = self.stats.hessian.double().numpy()
        diagonal = np.diag(self.H)
        self.order = sorted(range(COLS), key=lambda j: (-diagonal[j], j))
        self.damp = 0.01 * diagonal.mean()
        self.costs = reference.removal_costs(self.H, self.order, self.damp)
        self.target = self.W
        if dense:
            self.target = reference.dense_target(
                self.W, X.double().numpy(), X_dense.double().numpy(), self.damp
            )

    def sweep(self, W, **settings):
        return reference.sweep(W, self.H, self.order, self.damp, **settings)

    def choose_by_blocks(self, sparsity, block, grid=None):
        """OBS saliency, less what rounding would cost; each block prunes what is due by its end."""

        def choose(work, columns):
            scores = np.zeros((len(work), len(columns)))
            for row in range(len(work)):
                for i, col in enumerate(columns):
                    w = work[row, col]
                    left = 0.0
                    if grid is not None:
                        left = w - grid.value(grid.round_one(w, row, col)[0], row, col)
                    scores[row, i] = (w**2 - left**2) * self.costs[col]
            end = self.order.index(columns[-1]) + 1
            due = round(sparsity * len(work) * end)
            due -= round(sparsity * len(work) * (end - len(columns)))
            return reference.all_but_lowest(scores, due)

        return choose


def assert_follows(result, expected):
    assert expected.margin > 1e-4, "a rounding tie: take another seed"
    np.testing.assert_array_equal(result.codes.numpy(), expected.codes)
    np.testing.assert_allclose(result.dequantize().numpy(), expected.weight, atol=1e-5)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("block", [4, 6, 128])
def test_sparsegpt_follows_the_reference(block, dense):
    problem = Problem(20, dense)
    result = compress(
        problem.weight,
        problem.stats,
        PruneSpec("sparsegpt", 0.4),
        None,
        SolverSpec(block_size=block, descent_rounds=0),
    )
    choose = problem.choose_by_blocks(0.4, block)
    expected = problem.sweep(problem.target, choose=choose, span=block)
    np.testing.assert_array_equal(result.mask.numpy(), expected.keep)
    np.testing.assert_allclose(result.values.numpy(), expected.weight, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(2, 4, False), (3, 16, True), (4, 8, True)]
)
def test_gptq_follows_the_reference(bits, group, symmetric, dense):
    problem = Problem(30, dense)
    quant = QuantSpec("gptq", bits, group, symmetric)
    result = compress(
        problem.weight, problem.stats, None, quant, SolverSpec(block_size=6, descent_rounds=0)
    )
    assert_follows(result, problem.sweep(problem.target, grid=reference_grid(result.grid)))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(2, 16, True), (3, 8, False), (4, 4, True)]
)
def test_joint_follows_the_reference(bits, group, symmetric, dense):
    problem = Problem(40, dense)
    quant, block = QuantSpec("gptq", bits, group, symmetric), 6
    result = compress(
        problem.weight,
        problem.stats,
        PruneSpec("sparsegpt", 0.4),
        quant,
        SolverSpec(block_size=block, descent_rounds=0),
    )
    grid = reference_grid(result.grid)
    choose = problem.choose_by_blocks(0.4, block, grid)
    expected = problem.sweep(problem.target, choose=choose, span=block, grid=grid)
    np.testing.assert_array_equal(result.mask.numpy(), expected.keep)
    assert_follows(result, expected)


@pytest.mark.parametrize("mode", ["sequential-a", "sequential-b"])
@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(2, 16, True), (3, 8, False), (4, 4, True)]
)
def test_sequences_follow_the_reference(mode, bits, group, symmetric):
    problem = Problem(50, dense=False)
    quant, block = QuantSpec("gptq", bits, group, symmetric), 6
    result = compress(
        problem.weight,
        problem.stats,
        PruneSpec("sparsegpt", 0.4),
        quant,
        SolverSpec(mode, block_size=block, descent_rounds=0),
    )
    choose = problem.choose_by_blocks(0.4, block)
    pruned = problem.sweep(problem.target, choose=choose, span=block)
    np.testing.assert_array_equal(result.mask.numpy(), pruned.keep)
    expected = problem.sweep(
        pruned.weight,
        choose=lambda _, columns: pruned.keep[:, columns],
        grid=reference_grid(result.grid),
        push=mode == "sequential-a",
    )
    assert_follows(result, expected)


@pytest.mark.parametrize("prune", ["magnitude", "wanda"])
def test_pruners_without_compensation_choose_from_the_dense_weights(prune):
    problem = Problem(60, dense=True)
    quant = QuantSpec("gptq", 3, 8)
    spec = PruneSpec(prune, 0.4)
    result = compress(
        problem.weight, problem.stats, spec, quant, SolverSpec(block_size=6, descent_rounds=0)
    )
    keep = dense_mask(prune, problem.W, problem.H, 0.4)
    np.testing.assert_array_equal(result.mask.numpy(), keep)
    expected = problem.sweep(
        problem.target, choose=lambda _, at: keep[:, at], grid=reference_grid(result.grid)
    )
    assert_follows(result, expected)


def dense_mask(prune, W, H, sparsity):
    if prune == "magnitude":
        return reference.all_but_lowest(np.abs(W), round(sparsity * W.size))
    base, extra = divmod(round(sparsity * W.size), len(W))
    scores = np.abs(W) * np.sqrt(np.diag(H))
    rows = [reference.all_but_lowest(s[None], base + (i < extra)) for i, s in enumerate(scores)]
    return np.concatenate(rows)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prune", ["magnitude", "wanda"])
def test_without_compensation_survivors_only_round(prune, mode):
    """Nothing moves: pruned weights are 0, the others their dense value or its nearest code."""
    problem = Problem(70, dense=True)
    spec = SolverSpec(mode)
    keep = dense_mask(prune, problem.W, problem.H, 0.3)
    bare = compress(problem.weight, problem.stats, PruneSpec(prune, 0.3), None, spec)
    np.testing.assert_array_equal(bare.mask.numpy(), keep)
    np.testing.assert_array_equal(bare.values.numpy(), problem.weight.numpy() * keep)
    for symmetric in (True, False):
        quant = QuantSpec("rtn", 4, 8, symmetric)
        result = compress(problem.weight, problem.stats, PruneSpec(prune, 0.3), quant, spec)
        grid = reference_grid(result.grid)
        for row, col in np.ndindex(*keep.shape):
            code = grid.zero_code(row, col)
            tie = False
            if keep[row, col]:
                code, margin = grid.round_one(problem.W[row, col], row, col)
                tie = margin < 1e-4  # the largest weight of a symmetric group is half-way by design
            assert abs(int(result.codes[row, col]) - code) <= tie


# --- what it is for ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("symmetric", [True, False])
def test_joint_has_a_lower_output_error_than_magnitude_and_rtn(seed, symmetric):
    W, stats = weight(seed, 24, 32), moments(inputs(seed + 1, 32, 128))
    ours, plain = (
        compress(W, stats, PruneSpec(p, 0.25), QuantSpec(q, 4, 16, symmetric))
        for p, q in (("sparsegpt", "gptq"), ("magnitude", "rtn"))
    )
    assert ours.error < 0.6 * plain.error


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("prune", "quant"),
    [
        (PruneSpec("sparsegpt", 0.3), None),
        (None, QuantSpec("gptq", 4)),
        (PruneSpec("sparsegpt", 0.3), QuantSpec("gptq", 4, 8)),
        (PruneSpec("magnitude", 0.3), QuantSpec("gptq", 4, 8)),
    ],
)
def test_dense_targets_bring_the_outputs_nearer_to_the_dense_model(prune, quant, mode):
    X_dense = inputs(80, tokens=200)
    X = X_dense + 0.15 * inputs(81, tokens=200)
    W, stats = weight(82, 12), moments(X, X_dense)
    errors = []
    for dense in (True, False):
        result = compress(W, stats, prune, quant, SolverSpec(mode, dense_targets=dense))
        outputs = X.double() @ result.dequantize().double().T
        errors.append(float((outputs - X_dense.double() @ W.double().T).square().sum()))
    assert errors[0] < 0.98 * errors[1]


GPTQ3, GPTQ2 = QuantSpec("gptq", 3), QuantSpec("gptq", 2, -1, False)
SPARSE, PATTERN = PruneSpec("sparsegpt", 0.4), PruneSpec.of("wanda", 0, "2:4")


@pytest.mark.parametrize(
    ("prune", "quant"),
    [
        (None, GPTQ3),
        (None, GPTQ2),
        (SPARSE, None),
        (SPARSE, GPTQ3),
        (SPARSE, GPTQ2),
        (PATTERN, GPTQ3),
        (PATTERN, GPTQ2),
    ],
)
def test_every_round_of_descent_lowers_the_damped_error(prune, quant):
    W, stats = weight(87, 12), moments(inputs(88))
    damped = stats.hessian + 0.01 * stats.hessian.diagonal().mean() * torch.eye(COLS)
    errors, kept = [], []
    for rounds in range(4):
        result = compress(W, stats, prune, quant, SolverSpec(descent_rounds=rounds))
        errors.append(output_error(result.dequantize() - W, damped))
        kept.append(result.mask)
        assert_exact(result, prune.sparsity if prune else 0)
    assert all(after <= before * (1 + 1e-4) for before, after in pairwise(errors))
    assert errors[3] < errors[0]
    if prune is PATTERN:
        assert all(torch.equal(mask, kept[0]) for mask in kept)
    elif prune is SPARSE:  # weights change places with pruned ones, within their row
        assert torch.equal(kept[1], kept[0])
        assert not torch.equal(kept[2], kept[1])
        assert all(torch.equal(mask.sum(dim=1), kept[0].sum(dim=1)) for mask in kept)


def test_without_compensation_nothing_descends():
    W, stats = weight(87, 12), moments(inputs(88))
    plain, polished = (
        compress(W, stats, PATTERN, None, SolverSpec(descent_rounds=rounds)) for rounds in (0, 3)
    )
    assert torch.equal(plain.values, polished.values)
    assert torch.equal(plain.mask, polished.mask)


@pytest.mark.parametrize("mode", MODES)
def test_dense_targets_of_part_of_the_tokens_are_regressed_on_those(mode):
    X_dense, W = inputs(70, tokens=150), weight(71, 12)
    X = X_dense + 0.2 * inputs(72, tokens=150)
    part, part_dense = X[:60], X_dense[:60]
    stats = replace(moments(X), cross=part_dense.T @ part, paired=part.T @ part)
    damp = 0.01 * float(stats.paired.diagonal().mean())
    target = reference.dense_target(W.double().numpy(), part.numpy(), part_dense.numpy(), damp)
    target = torch.from_numpy(target).float()
    prune, quant = PruneSpec("sparsegpt", 0.3), QuantSpec("gptq", 4, 8)
    expected = compress(target, moments(X), prune, quant, SolverSpec(mode))
    plans = {"layer": LayerPlan("layer", prune, quant)}
    for by_inputs in (False, True):
        group = compress_group({"layer": W}, stats, plans, SolverSpec(mode), by_inputs=by_inputs)
        result = group["layer"]
        assert (result.codes != expected.codes).float().mean() < 0.02  # but for rounding
        torch.testing.assert_close(result.grid.scale, expected.grid.scale, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("prune", "quant"), [("magnitude", None), ("wanda", None), (None, "rtn"), ("wanda", "rtn")]
)
def test_methods_that_do_not_compensate_factorise_nothing(prune, quant):
    """Moments that nothing could be factorised from, and a group with a linear that is left alone."""
    broken = torch.full((COLS, COLS), float("nan"))
    stats = replace(moments(inputs(73)), cross=torch.eye(COLS), paired=broken)
    plan = LayerPlan(
        "layer", PruneSpec(prune, 0.25) if prune else None, QuantSpec(quant) if quant else None
    )
    weights = {"layer": weight(74), "other": weight(75)}
    result = compress_group(
        weights, stats, {"layer": plan, "other": LayerPlan("other")}, SolverSpec(), torch.float32
    )
    assert list(result) == ["layer"]
    assert_exact(result["layer"], 0.25 if prune else 0)


def test_dense_targets_change_nothing_where_inputs_agree():
    X = inputs(83)
    prune, quant = PruneSpec("sparsegpt", 0.3), QuantSpec("gptq", 4, 8)
    with_cross = compress(weight(84), moments(X, X), prune, quant)
    without = compress(weight(84), moments(X), prune, quant)
    assert torch.equal(with_cross.codes, without.codes)


def test_error_is_relative_to_the_energy_of_the_outputs():
    X, W = inputs(85), weight(86)
    result = compress(W, moments(X), PruneSpec("sparsegpt", 0.5), QuantSpec("gptq", 3))
    X, W = X.double(), W.double()
    lost = (X @ (result.dequantize().double() - W).T).square().sum()
    assert result.error == pytest.approx(float(lost / (X @ W.T).square().sum()), rel=1e-3)


PAIRS = [(p, q) for p in (None, *pruners()) for q in (None, *quantizers()) if p or q]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("prune", "quant"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_checkpoints_hold_exactly_what_is_computed(prune, quant, mode, dtype):
    result = compress(
        weight(90),
        moments(inputs(91)),
        PruneSpec(prune, 0.4) if prune else None,
        QuantSpec(quant, 3, 8, False) if quant else None,
        SolverSpec(mode),
        dtype,
    )
    out = result.dequantize()
    assert torch.equal(out, out.to(dtype).float())
    assert_exact(result, 0.4 if prune else 0)
    if quant is None:
        assert result.codes is None
        assert torch.equal(result.values.to(dtype).float(), out)
        assert result.values.dtype == dtype
    else:
        assert torch.equal(result.grid.scale, result.grid.scale.to(dtype).float())
        scale = result.grid.scale.repeat_interleave(8, 1).to(dtype)
        zero = result.grid.zero_point.repeat_interleave(8, 1)
        assert torch.equal(((result.codes - zero).to(dtype) * scale).float(), out)


def test_a_layer_that_no_input_reached_is_still_compressed():
    stats = Moments(torch.zeros(COLS, COLS), torch.zeros(COLS, COLS))
    for prune in pruners():
        for quant in (None, *quantizers()):
            quantized = QuantSpec(quant, 4, 8) if quant else None
            result = compress(weight(92), stats, PruneSpec(prune, 0.25), quantized)
            assert_exact(result, 0.25)
            assert result.error == 0


@pytest.mark.parametrize("prune", pruners())
def test_inputs_that_are_always_zero_do_not_break_a_layer(prune):
    X = inputs(93)
    X[:, [0, 5, 6]] = 0
    result = compress(weight(94), moments(X, X), PruneSpec(prune, 0.25), QuantSpec("gptq", 4, 4))
    assert_exact(result, 0.25)


def test_weights_and_moments_are_not_changed():
    X = inputs(95)
    W, stats = weight(96), moments(X, X + 1)
    before = W.clone(), stats.hessian.clone(), stats.cross.clone()
    for mode in MODES:
        for prune in pruners():
            compress(W, stats, PruneSpec(prune, 0.5), QuantSpec("gptq", 4), SolverSpec(mode))
    after = W, stats.hessian, stats.cross
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# --- what it refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 5, 32])
@pytest.mark.parametrize("quant", quantizers())
def test_a_group_size_that_does_not_divide_is_refused(size, quant):
    with pytest.raises(
        InputError, match=rf"group size {size} does not divide the width 16 of layer"
    ):
        compress(weight(0), moments(inputs(0)), None, QuantSpec(quant, 4, size))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("quant", [None, *quantizers()])
@pytest.mark.parametrize("prune", pruners())
@pytest.mark.parametrize("actorder", ["static", None])
def test_a_pattern_that_does_not_divide_is_refused(prune, quant, mode, actorder):
    quantized = QuantSpec(quant, 4, -1, True, actorder) if quant else None
    with pytest.raises(InputError, match=r"2:4.*10"):
        compress(
            weight(0, 4, 10),
            moments(inputs(0, 10)),
            PruneSpec.of(prune, 0, "2:4"),
            quantized,
            SolverSpec(mode),
        )


def test_unknown_methods_are_refused():
    with pytest.raises(InputError, match="'obd'"):
        compress(weight(0), moments(inputs(0)), PruneSpec("obd", 0.5))
    with pytest.raises(InputError, match="'awq'"):
        compress(weight(0), moments(inputs(0)), None, QuantSpec("awq"))


def test_moments_that_are_not_finite_are_refused():
    stats = moments(inputs(0))
    stats.hessian[2, 3] = float("nan")
    with pytest.raises(NumericalError, match="not finite"):
        compress(weight(0), stats, PruneSpec("sparsegpt", 0.5), QuantSpec("gptq"))


def test_the_damping_asked_for_is_the_damping_used():
    problem = Problem(97, dense=False)
    quant = QuantSpec("gptq", 4, 16)
    result = compress(
        problem.weight, problem.stats, None, quant, SolverSpec(dampening_frac=0.5, descent_rounds=0)
    )
    problem.damp = 0.5 * np.diag(problem.H).mean()
    assert_follows(result, problem.sweep(problem.target, grid=reference_grid(result.grid)))


def test_factors_are_shared_between_plans_on_the_same_statistics():
    """Many plans of a group cost a single factorisation, and give what each gives alone."""
    W, stats, factors = {"layer": weight(1)}, moments(inputs(2)), {}
    for bits in (3, 4):
        plans = {"layer": LayerPlan("layer", SPARSE, QuantSpec(num_bits=bits))}
        statistics = LayerStatistics(stats.hessian)
        problem = LayerProblem(W, plans, statistics, SolverSpec(), torch.float32)
        shared = solve(problem, factors)["layer"]
        assert len(factors) == 1
        alone = compress(W["layer"], stats, SPARSE, QuantSpec(num_bits=bits))
        assert torch.equal(shared.codes, alone.codes)


def test_output_error_of_a_group_is_the_sum_of_its_linears():
    """Stacked rows are independent outputs: errors add up."""
    stats = moments(inputs(98))
    plans = {name: LayerPlan(name, None, QuantSpec("gptq", 3)) for name in ROWS}
    weights = group_weights(99)
    results = compress_group(weights, stats, plans, SolverSpec(), torch.float32)
    delta = torch.cat([results[n].dequantize() - weights[n] for n in ROWS])
    parts = sum(results[n].error * output_error(weights[n], stats.hessian) for n in ROWS)
    assert output_error(delta, stats.hessian) == pytest.approx(parts, rel=1e-4)
