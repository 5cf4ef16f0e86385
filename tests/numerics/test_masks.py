"""Masks: exact counts, ties, patterns."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from srcr.errors import InputError
from srcr.numerics import masks, saliency
from srcr.numerics.kernels.dispatch import kth_smallest
from srcr.numerics.sparsity import count_pruned, parse_structure

pytestmark = pytest.mark.usefixtures("two_threads")

shapes = st.tuples(st.integers(1, 7), st.integers(1, 9))
sparsities = st.floats(0, 0.999, allow_nan=False)
seeds = st.integers(0, 10_000)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def random_scores(shape, seed, ties=False):
    generator = torch.Generator().manual_seed(seed)
    if ties:
        return torch.randint(0, 3, shape, generator=generator).float()
    return torch.rand(shape, generator=generator)


numbers = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, 1.5, -1.0])


@given(values=st.lists(numbers, min_size=1, max_size=300), data=st.data())
def test_the_kth_smallest(values, data):
    k = data.draw(st.integers(0, len(values) - 1))
    assert kth_smallest(torch.tensor(values), k) == sorted(values)[k]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_the_kth_smallest_of_many(device):
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).to(device)
    ranked = values.sort().values
    for k in (0, 1, 25_000, 99_999):
        assert kth_smallest(values, k) == float(ranked[k])


@given(shape=shapes, sparsity=sparsities, seed=seeds, ties=st.booleans())
def test_the_whole_layer_loses_exactly_the_lowest(shape, sparsity, seed, ties):
    scores = random_scores(shape, seed, ties)
    count = count_pruned(sparsity, scores.numel())
    mask = masks.prune_lowest(scores, count)
    assert int((~mask).sum()) == count
    if 0 < count < scores.numel():
        assert scores[~mask].max() <= scores[mask].min()
    expected = reference.all_but_lowest(scores.numpy(), count)
    assert mask.numpy().tolist() == expected.tolist()


@given(sparsity=sparsities, size=st.integers(1, 10_000))
def test_count_is_the_nearest_whole_number(sparsity, size):
    count = count_pruned(sparsity, size)
    assert 0 <= count <= size
    assert abs(count - sparsity * size) <= 0.5


def test_ties_go_from_the_first():
    mask = masks.prune_lowest(torch.ones(2, 3), 4)
    assert mask.tolist() == [[False, False, False], [False, True, True]]


@pytest.mark.parametrize("count", [0, 6])
def test_none_and_all(count):
    assert int(masks.prune_lowest(torch.rand(2, 3), count).sum()) == 6 - count
    assert int(masks.prune_rowwise(torch.rand(2, 3), count).sum()) == 6 - count


@given(shape=shapes, sparsity=sparsities, seed=seeds, ties=st.booleans())
def test_rowwise_counts_are_exact_and_even(shape, sparsity, seed, ties):
    scores = random_scores(shape, seed, ties)
    count = count_pruned(sparsity, scores.numel())
    mask = masks.prune_rowwise(scores, count)
    pruned = (~mask).sum(1).tolist()
    assert sum(pruned) == count
    assert max(pruned) - min(pruned) <= 1
    assert pruned == sorted(pruned, reverse=True)  # the first rows give the odd ones
    for row, kept, lost in zip(scores, mask, pruned, strict=True):
        assert kept.tolist() == reference.all_but_lowest(row.numpy()[None, :], lost)[0].tolist()


@given(
    pattern=st.sampled_from([(1, 2), (2, 4), (3, 4), (6, 8), (1, 4), (5, 7)]),
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    seed=seeds,
    ties=st.booleans(),
)
def test_n_of_m_keeps_the_highest_n_of_every_m(pattern, rows, groups, seed, ties):
    scores = random_scores((rows, groups * pattern[1]), seed, ties)
    mask = masks.n_of_m_mask(scores, *pattern)
    assert bool((mask.view(rows, groups, pattern[1]).sum(-1) == pattern[0]).all())
    assert mask.tolist() == reference.n_of_m(scores.numpy(), *pattern).tolist()


@pytest.mark.parametrize(("cols", "group"), [(10, 4), (3, 4), (9, 2)])
def test_n_of_m_refuses_a_width_that_m_does_not_divide(cols, group):
    with pytest.raises(InputError, match=rf"1:{group}.*got {cols}"):
        masks.n_of_m_mask(torch.rand(2, cols), 1, group)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("unstructured", None), ("2:4", (2, 4)), ("6:8", (6, 8)), ("1:128", (1, 128))],
)
def test_structures_that_are_known(text, expected):
    assert parse_structure(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2:4 ",
        " 2:4",
        "2/4",
        "2:4:8",
        "-2:4",
        "a:b",
        "Unstructured",
        "1000:2000",
        "\uff12:\uff14",
    ],
)
def test_structures_that_are_not_known_are_named(text):
    with pytest.raises(InputError) as caught:
        parse_structure(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["0:4", "4:4", "5:4", "0:0", "1:1"])
def test_patterns_that_keep_none_or_all_are_refused(text):
    with pytest.raises(InputError, match="N must be at least 1 and less than M"):
        parse_structure(text)


def test_saliencies_follow_their_formulas():
    W = torch.tensor([[3.0, -4.0], [0.0, 2.0]])
    assert saliency.magnitude(W).tolist() == [[3, 4], [0, 2]]
    assert saliency.wanda(W, torch.tensor([4.0, 9.0])).tolist() == [[6, 12], [0, 6]]
    assert saliency.obs(W, torch.tensor([0.5, 2.0])).tolist() == [[36, 4], [0, 1]]
    assert saliency.wanda(W, torch.tensor([-1e-7, 1.0])).tolist() == [[0, 4], [0, 2]]
