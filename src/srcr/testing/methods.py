"""What every pruner and every quantizer must do, whatever its idea.

Alone first, so that a fault is named where it is; then in the solver, with every kind of mask and grid.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from srcr import methods
from srcr.methods import Pruner, Quantizer
from srcr.numerics.compressed import CompressedWeight
from srcr.numerics.grid import Grid, GridSpec, code_range
from srcr.numerics.hessian import LayerStatistics
from srcr.numerics.sparsity import UNSTRUCTURED, count_pruned, parse_structure
from srcr.plans.plan import LayerPlan
from srcr.plans.specs import PruneSpec, QuantSpec, SolverSpec
from srcr.solver.problem import LayerProblem
from srcr.solver.solve import solve
from srcr.testing.requirement import require

ROWS, COLS, TOKENS = 12, 32, 256
#: Columns that share a scale where it is not the whole row.
GROUP = 8
#: Of what 8 bits may leave of the weights' squared norm; round-to-nearest leaves a hundredth of that.
ERROR_AT_8_BITS = 1e-2

#: Arguments of a method by their names.
Arguments = dict[str, Any]


def check_pruner(pruner: Pruner | str) -> None:
    """Nothing, if ``pruner`` (or the one of that name) conforms: a score for each weight and no NaN, of a
    row's own weights, repeatable, its arguments unchanged; in the solver exact counts, exact zeros, N:M.

    Raises:
        AssertionError: names the fault.
    """
    pruner = methods.get_pruner(pruner) if isinstance(pruner, str) else pruner
    who = f"pruner {pruner.name!r}"
    require(pruner.scope in ("layer", "row"), f"{who}: scope {pruner.scope!r} is no layer or row")
    W, statistics = _layer(seed=0)
    diagonal = statistics.hessian.diagonal()
    pivots = torch.linspace(0.2, 1.5, COLS)
    for rounded in (None, (W * 2).round() / 2):
        arguments = {"W": W, "diagonal": diagonal, "pivots": pivots, "rounded": rounded}
        call = _Call(f"{who}, scores", pruner.scores, arguments)
        scores = call.result()
        require(isinstance(scores, Tensor), f"{who}: scores are no tensor but {type(scores)}")
        require(
            scores.shape == W.shape,
            f"{who}: scores have the shape {list(scores.shape)}, the weights {list(W.shape)}",
        )
        require(not bool(scores.isnan().any()), f"{who}: scores are NaN")
        call.check_repeats(torch.equal, W=_layer(seed=1)[0])
        part = call.result(W=W[3:5], rounded=None if rounded is None else rounded[3:5])
        require(
            part.shape == (2, COLS) and torch.allclose(part, scores[3:5], rtol=1e-4),
            f"{who}: the scores of a row depend on other rows, which it may not be given",
        )
    with _registered(methods.pruners(), pruner):
        _check_pruned(who, pruner.name)


def check_quantizer(quantizer: Quantizer | str) -> None:
    """Nothing, if ``quantizer`` (or the one of that name) conforms: grids of the shape, width, symmetry and
    precision asked for, which hold zero, are finer with every bit, of a row's own weights, repeatable; its
    arguments unchanged; in the solver codes in range and few enough values.

    Raises:
        AssertionError: names the fault.
    """
    quantizer = methods.get_quantizer(quantizer) if isinstance(quantizer, str) else quantizer
    who = f"quantizer {quantizer.name!r}"
    for symmetric in (True, False):
        for size, dtype, product in (
            (COLS, torch.float32, None),
            (GROUP, torch.float32, None),
            (COLS, torch.bfloat16, None),
            (GROUP, torch.float16, torch.float32),
        ):
            specs = [GridSpec(bits, size, symmetric, dtype, product) for bits in range(2, 9)]
            errors = [_check_fit(who, quantizer, spec) for spec in specs]
            finer = all(after < before for before, after in pairwise(errors))
            require(finer, f"{who}: more num_bits do not make the rounding error less: {errors}")
            require(
                errors[-1] < ERROR_AT_8_BITS,
                f"{who}: 8 bits leave the relative squared error {errors[-1]:.3g}",
            )
    with _registered(methods.quantizers(), quantizer):
        for bits in range(2, 9):
            for symmetric in (True, False):
                _check_quantized(who, QuantSpec(quantizer.name, bits, -1, symmetric))
                _check_quantized(who, QuantSpec(quantizer.name, bits, GROUP, symmetric))


def _check_pruned(who: str, name: str) -> None:
    """Exact counts and zeros of a pruner in the solver, alone and with either kind of quantizer."""
    quants = [None, QuantSpec("gptq", 4, -1), QuantSpec("rtn", 3, GROUP, False)]
    for structure, sparsity in ((UNSTRUCTURED, 0.3), ("2:4", 0.5), ("3:4", 0.25)):
        for quant in quants:
            case = f"{who} ({structure}, {quant.method if quant else 'not quantized'})"
            weight = _solved(case, PruneSpec.of(name, sparsity, structure), quant)
            out, mask = weight.dequantize(), weight.mask
            require(mask is not None, f"{case}: nothing was pruned")
            assert mask is not None
            count, expected = int((~mask).sum()), count_pruned(sparsity, mask.numel())
            require(count == expected, f"{case}: {count} weights were pruned, not {expected}")
            require(bool((out[~mask] == 0).all()), f"{case}: pruned weights are not zero")
            pattern = parse_structure(structure)
            if pattern is not None:
                kept = mask.view(ROWS, -1, pattern[1]).sum(-1)
                require(bool((kept == pattern[0]).all()), f"{case}: the mask is not {structure}")


def _check_fit(who: str, quantizer: Quantizer, spec: GridSpec) -> float:
    """A grid by itself, with and without a mask; the relative squared error of rounding to the nearest
    code on it."""
    W, statistics = _layer(seed=0)
    W[1] = 0  # scales of nothing must still be scales
    mask = torch.rand(W.shape, generator=torch.Generator().manual_seed(2)) > 0.4
    mask[2, :GROUP] = False
    case = f"{who} ({spec.num_bits} bits, groups of {spec.group_size}, "
    case += f"{'symmetric' if spec.symmetric else 'asymmetric'}, {spec.dtype})"
    importance = statistics.hessian.diagonal()
    for kept in (mask, None):
        arguments = {"W": W, "spec": spec, "importance": importance, "mask": kept}
        call = _Call(f"{case}, fit", quantizer.fit, arguments)
        grid = call.result()
        _check_grid(case, grid, spec)
        call.check_repeats(_same_grid, W=_layer(seed=1)[0])
        part = call.result(W=W[3:5], mask=None if kept is None else kept[3:5])
        require(
            part.scale.shape == grid.scale[3:5].shape
            and torch.allclose(part.scale, grid.scale[3:5], rtol=1e-4),
            f"{case}: the grid of a row depends on other rows, which may be those of another linear",
        )
    qparams = grid.expand()
    error = qparams.dequantize(qparams.quantize(W)) - W
    return float(error.square().sum() / W.square().sum())


def _check_grid(case: str, grid: Grid, spec: GridSpec) -> None:
    """A grid is of its spec, can be stored, and holds zero."""
    require(isinstance(grid, Grid), f"{case}: what was fitted is no Grid but {type(grid)}")
    asked = spec.num_bits, spec.group_size, spec.dtype, spec.product or spec.dtype
    given = grid.num_bits, grid.group_size, grid.dtype, grid.product_dtype
    names = ("num_bits", "group_size", "dtype", "product_dtype")
    for name, wanted, actual in zip(names, asked, given, strict=True):
        require(actual == wanted, f"{case}: the grid's {name} is {actual}, not {wanted}")
    scale, zero, shape = grid.scale, grid.zero_point, (ROWS, COLS // spec.group_size)
    require(
        scale.shape == shape,
        f"{case}: the scales have the shape {list(scale.shape)}, not {list(shape)}",
    )
    require(scale.dtype == torch.float32, f"{case}: the scales are held in {scale.dtype}")
    require(bool(scale.isfinite().all()), f"{case}: a scale is not finite")
    require(bool((scale != 0).all()), f"{case}: a scale is 0")
    stored = scale.to(spec.dtype).to(torch.float32)
    require(torch.equal(stored, scale), f"{case}: the scales are not numbers of {spec.dtype}")
    require(
        (zero is None) == spec.symmetric,
        f"{case}: the grid has {'no zero-point' if zero is None else 'a zero-point'}",
    )
    if zero is not None:
        low, high = code_range(spec.num_bits)
        require(zero.shape == shape, f"{case}: the zero-points have the shape {list(zero.shape)}")
        on_grid = (zero == zero.round()) & (zero >= low) & (zero <= high)
        require(bool(on_grid.all()), f"{case}: zero is not on the grid: a zero-point is no code")


def _check_quantized(who: str, quant: QuantSpec) -> None:
    """Codes of a quantizer in the solver: in range, and no more values than there are codes."""
    case = (
        f"{who} ({quant.num_bits} bits, group size {quant.group_size}, symmetric {quant.symmetric})"
    )
    weight = _solved(case, None, quant)
    codes, (low, high) = weight.codes, code_range(quant.num_bits)
    require(codes is not None, f"{case}: nothing was quantized")
    assert codes is not None
    require(
        low <= int(codes.min()) and int(codes.max()) <= high,
        f"{case}: codes from {int(codes.min())} to {int(codes.max())}, not {low} to {high}",
    )
    size = COLS if quant.group_size == -1 else GROUP
    for row in weight.dequantize().view(-1, size):
        values = len(row.unique())
        require(values <= 2**quant.num_bits, f"{case}: {values} values share a scale")


def _solved(case: str, prune: PruneSpec | None, quant: QuantSpec | None) -> CompressedWeight:
    """A layer solved by a plan: finite, and the same when solved again."""
    plan = LayerPlan("layer", prune, quant)
    first, second = (
        solve(LayerProblem({"layer": W}, {"layer": plan}, stats, SolverSpec(), torch.float32))
        for W, stats in (_layer(seed=0), _layer(seed=0))
    )
    out = first["layer"].dequantize()
    require(bool(torch.isfinite(out).all()), f"{case}: a weight is not finite")
    require(torch.equal(out, second["layer"].dequantize()), f"{case}: a second run gives others")
    return first["layer"]


@dataclass(frozen=True)
class _Call:
    """A method's function with its ``arguments``, which it must not change."""

    what: str
    function: Callable[..., Any]
    arguments: Arguments

    def result(self, **changes: Any) -> Any:
        """What the function gives for the arguments with some ``changes``."""
        arguments = self.arguments | changes
        before = {k: v.clone() for k, v in arguments.items() if isinstance(v, Tensor)}
        try:
            result = self.function(*arguments.values())
        except Exception as error:
            raise AssertionError(f"{self.what} raised {type(error).__name__}: {error}") from error
        for name, tensor in before.items():
            require(
                torch.equal(arguments[name], tensor), f"{self.what} changed its argument {name}"
            )
        return result

    def check_repeats(self, same: Callable[[Any, Any], bool], **others: Tensor) -> None:
        """The function gives the same again, after a call with ``others`` and in another random state."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            first = self.result()
            self.result(**others)
            torch.manual_seed(1)
            again = self.result()
        require(
            same(first, again),
            f"{self.what} gave another result for the same arguments: it depends on the calls before it or "
            "on the global random state",
        )


def _same_grid(left: Grid, right: Grid) -> bool:
    if left.zero_point is not None and right.zero_point is not None:
        return torch.equal(left.scale, right.scale) and torch.equal(
            left.zero_point, right.zero_point
        )
    return torch.equal(left.scale, right.scale)


@contextmanager
def _registered(registry: dict[str, Any], method: Pruner | Quantizer) -> Iterator[None]:
    """While this is open, the solver knows the method by its name."""
    before = registry.get(method.name)
    registry[method.name] = method
    try:
        yield
    finally:
        if before is None:
            del registry[method.name]
        else:
            registry[method.name] = before


def _layer(seed: int) -> tuple[Tensor, LayerStatistics]:
    """A random weight [12, 32] and the moments of 256 correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, COLS, generator=generator) @ torch.randn(
        COLS, COLS, generator=generator
    )
    W = torch.randn(ROWS, COLS, generator=generator)
    hessian = x.T @ x
    return W, LayerStatistics(hessian, {"layer": W @ hessian})
