"""Groups of columns removed, against exact least squares on every subset."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srcr.errors import NumericalError
from srcr.numerics.elements import _Tableau, choose_elements, damped, refit

SEEDS = st.integers(0, 2**31 - 1)


def problem(seed: int, groups: int, size: int, rows: int = 3) -> tuple[Tensor, Tensor]:
    """Weights [rows, cols] and a damped Hessian [cols, cols] of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    cols = groups * size
    mix = torch.randn(cols, cols, generator=generator, dtype=torch.float64)
    X = torch.randn(4 * cols, cols, generator=generator, dtype=torch.float64) @ mix
    W = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    return W, damped(X.T @ X, 0.01)


def columns(groups: list[int], size: int) -> Tensor:
    return torch.tensor([g * size + i for g in groups for i in range(size)], dtype=torch.int64)


def loss(W: Tensor, H: Tensor, gone: list[int], size: int) -> float:
    """Half the objective of the best weights without the groups ``gone``: the Schur complement of what is
    left, by its definition."""
    out = columns(gone, size)
    left = torch.tensor([c for c in range(len(H)) if c not in out.tolist()], dtype=torch.int64)
    S = H[out][:, out]
    if len(left):
        S = S - H[out][:, left] @ torch.linalg.solve(H[left][:, left], H[left][:, out])
    return 0.5 * float((W[:, out] @ S * W[:, out]).sum())


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(1, 3))
def test_worth_and_exchange_are_those_of_exact_least_squares(seed: int, size: int) -> None:
    W, H = problem(seed, 6, size)
    tableau = _Tableau(torch.linalg.inv(H), W.T.clone(), size)
    for number, worth in enumerate(tableau.worth().tolist()):
        assert worth == pytest.approx(loss(W, H, [number], size), rel=1e-6)
    assert tableau.exchange(torch.tensor([1, 4])) == pytest.approx(
        loss(W, H, [1, 4], size), rel=1e-6
    )
    worth = tableau.worth()
    assert float(worth[2]) == pytest.approx(
        loss(W, H, [1, 2, 4], size) - loss(W, H, [1, 4], size), rel=1e-5
    )
    assert float(worth[4]) == pytest.approx(  # what its return gains
        loss(W, H, [1, 4], size) - loss(W, H, [1], size), rel=1e-5
    )
    left = [c for c in range(6 * size) if c // size not in (1, 4)]
    torch.testing.assert_close(tableau.B[left].T, refit(W, H, columns([1, 4], size)))


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(1, 3))
def test_an_exchange_undone_leaves_everything_as_it_was(seed: int, size: int) -> None:
    W, H = problem(seed, 5, size)
    tableau = _Tableau(torch.linalg.inv(H), W.T.clone(), size)
    tableau.exchange(torch.tensor([3]))
    before = tableau.A.clone(), tableau.B.clone(), tableau.left.clone()
    change = tableau.exchange(torch.tensor([0, 2])) + tableau.exchange(torch.tensor([2, 0]))
    scale = float(before[0].abs().max())
    assert change == pytest.approx(0, abs=1e-6 * abs(loss(W, H, [0, 2, 3], size)))
    torch.testing.assert_close(tableau.A, before[0], rtol=1e-6, atol=1e-9 * scale)
    torch.testing.assert_close(tableau.B, before[1], rtol=1e-6, atol=1e-6)
    assert torch.equal(tableau.left, before[2])


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(1, 2), st.integers(1, 4))
def test_what_goes_is_near_the_best_of_all_choices(seed: int, size: int, count: int) -> None:
    W, H = problem(seed, 6, size)
    chosen = choose_elements(W, H, size, count).tolist()
    assert chosen == sorted(set(chosen))
    assert len(chosen) == count
    losses = sorted(loss(W, H, list(each), size) for each in combinations(range(6), count))
    assert loss(W, H, chosen, size) <= losses[len(losses) // 4] * (1 + 1e-9)


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_no_exchange_of_a_pair_is_better(seed: int) -> None:
    W, H = problem(seed, 8, 1)
    chosen = choose_elements(W, H, 1, 3).tolist()
    before = loss(W, H, chosen, 1)
    # The best group that comes back, then the cheapest that goes: what the last round tried.
    back = min(chosen, key=lambda g: loss(W, H, [c for c in chosen if c != g], 1))
    rest = [c for c in chosen if c != back]
    after = min(loss(W, H, [*rest, g], 1) for g in range(8) if g not in rest)
    assert before <= after * (1 + 1e-6)


def test_dead_columns_go_first_and_cost_nothing() -> None:
    W, H = problem(0, 6, 1)
    H[2], H[:, 2], H[4], H[:, 4] = 0, 0, 0, 0
    H[2, 2] = H[4, 4] = 1.0
    W[:, [2, 4]] = 0
    assert choose_elements(W, H, 1, 2).tolist() == [2, 4]
    left = [0, 1, 3, 5]
    torch.testing.assert_close(refit(W, H, torch.tensor([2, 4])), W[:, left])


def test_all_but_none_and_a_hessian_that_is_none() -> None:
    W, H = problem(1, 4, 2)
    assert choose_elements(W, H, 2, 0).tolist() == []
    best = min(combinations(range(4), 3), key=lambda each: loss(W, H, list(each), 2))
    assert choose_elements(W, H, 2, 3).tolist() == list(best)
    with pytest.raises(NumericalError, match="not positive definite"):
        choose_elements(W, -H, 2, 1)
    with pytest.raises(NumericalError, match="not positive definite"):
        refit(W, -H, torch.tensor([0]))


def test_damping_is_a_fraction_of_the_mean_and_needs_no_input() -> None:
    H = torch.diag(torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(damped(H, 0.5).diagonal(), torch.tensor([2.0, 4.0]).double())
    assert damped(torch.zeros(2, 2), 0.01).diagonal().tolist() == [1.0, 1.0]
    assert H[0, 0] == 1
