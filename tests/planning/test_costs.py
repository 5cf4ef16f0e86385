from dataclasses import replace

import pytest

from architectures import tiny_architecture
from srcr.data.specs import Calibration
from srcr.errors import InputError
from srcr.models.checkpoint import open_model
from srcr.pipelines.compress import compress
from srcr.pipelines.options import Output, RunOptions
from srcr.planning.costs import SizeBudget, fill_budget, parse_target
from srcr.planning.space import SearchSpace
from srcr.plans.plan import Target
from srcr.plans.specs import CompressionLevel, QuantSpec
from srcr.testing import save_tiny_model, tiny_model

SPACE = SearchSpace()
QUIET = RunOptions(quiet=True)


def budget_of(model, target, space=SPACE, format_name="compressed-tensors"):
    return SizeBudget.of(target, open_model(model).blockwise, space, format_name)


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("tcr=0.8125", Target(tcr=0.8125)),
        ("stored=40MB", Target(stored_bytes=40_000_000)),
        ("loaded=1.5GiB", Target(loaded_bytes=1_610_612_736)),
    ],
)
def test_targets_as_people_write_them(text, target):
    assert parse_target(text) == target


@pytest.mark.parametrize("text", ["tcr", "tcr=x", "size=4GB", "stored=", "stored=4", ""])
def test_other_targets_are_refused(text):
    with pytest.raises(InputError):
        parse_target(text)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "opt", "qwen2"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_counted_is_what_is_written(family, symmetric, tmp_path):
    """Loaded bytes exactly, stored bytes never less and at most 1 % more on a tiny model."""
    opened = open_model(save_tiny_model(tmp_path / "base", family))
    shapes = opened.topology.shapes
    space = replace(SPACE, quant=QuantSpec(group_size=-1, symmetric=symmetric))
    levels = dict.fromkeys(shapes, CompressionLevel(0, 4))
    if symmetric:
        levels = {name: CompressionLevel(0, 3 if "0" in name else 6) for name in levels}
    check_counts(opened, space, levels, tmp_path / "out", 10**5)


def test_groups_of_an_automatic_size_are_counted(tmp_path):
    """Widths that 128 divides get groups of 128, and a scale for each."""
    folder = save_tiny_model(
        tmp_path / "base", "llama", hidden_size=128, intermediate_size=256, head_dim=32
    )
    opened = open_model(folder)
    space = replace(SPACE, quant=QuantSpec(group_size="auto"))
    levels = dict.fromkeys(opened.topology.shapes, CompressionLevel(0, 4))
    check_counts(opened, space, levels, tmp_path / "out", 10**6)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_what_stays_and_what_is_rounded_everywhere_is_counted(tied, tmp_path):
    opened = open_model(save_tiny_model(tmp_path / "base", "llama", tie_word_embeddings=tied))
    space = replace(
        SPACE, quant=QuantSpec(group_size=-1), ignore=("*.0.*",),
        embeddings=QuantSpec(num_bits=8, group_size=-1, actorder=None),
    )  # fmt: skip
    names = [name for group in space.groups(opened.topology) for name in group.names]
    levels = dict.fromkeys(names, CompressionLevel(0, 4))
    if tied:
        with pytest.raises(InputError, match="no engine holds"):
            budget_of(opened, Target(loaded_bytes=10**5), space)
        alone = replace(space, ignore=("*.0.*", "*embed_tokens"))
        assert budget_of(opened, Target(loaded_bytes=10**5), alone).fixed
    check_counts(opened, space, levels, tmp_path / "out", 10**5, loaded=not tied)
    budget = budget_of(opened, Target(tcr=0.3), space)
    weights = {n: rows * cols for n, (rows, cols) in opened.topology.shapes.items()}
    total = sum(weights.values())
    others = total - sum(weights[name] for name in names)
    assert budget.fixed == 16 * others
    assert budget.limit == int(16 * total * 0.7 + 1e-6) - 16 * others
    assert budget.chosen_weights == total - others


def test_bytes_in_memory_of_what_no_engine_holds_packed():
    for base, name in (
        (tiny_model("llama"), "archive"), (tiny_architecture("mixtral"), "compressed-tensors")
    ):  # fmt: skip
        with pytest.raises(InputError, match="give the target as stored="):
            SizeBudget.of(Target(loaded_bytes=10**6), open_model(base).blockwise, SPACE, name)


def check_counts(opened, space, levels, out, size, loaded=True):
    plan = space.plan(levels, opened.topology, 0)
    output = Output(out, "compressed-tensors")
    rates = compress(opened, output, plan, Calibration("self", 2, 16), QUIET).rates
    counts = [(Target(stored_bytes=size), rates.stored_bytes)]
    if loaded:
        counts.append((Target(loaded_bytes=size), rates.loaded_bytes))
    for target, written in counts:
        budget = budget_of(opened, target, space)
        counted = budget.fixed + sum(budget.cost(name, level) for name, level in levels.items())
        assert written <= counted <= (1 if target.loaded_bytes else 1.01) * written


def test_zeros_count_by_tcr_alone():
    opened = open_model(tiny_model("llama"))
    name = next(opened.topology.linears())
    half, whole = CompressionLevel(0.5, 4), CompressionLevel(0, 4)
    by_rate = budget_of(opened, Target(tcr=0.5))
    by_bytes = budget_of(opened, Target(stored_bytes=10**6))
    assert by_rate.cost(name, half) == by_rate.cost(name, whole) / 2
    assert by_bytes.cost(name, half) == by_bytes.cost(name, whole)


def test_dense_checkpoints_have_one_size():
    with pytest.raises(InputError, match="dense checkpoint has the same bytes"):
        budget_of(tiny_model("gpt2"), Target(stored_bytes=10**6), format_name="dense")


@pytest.mark.parametrize("tcr", [-0.1, 1.0, 1.5])
def test_rates_out_of_range(tcr):
    with pytest.raises(InputError, match=f"tcr={tcr:g}"):
        budget_of(tiny_model("llama"), Target(tcr=tcr))


def test_what_is_left_over_goes_back_to_pruned_layers():
    budget = budget_of(tiny_model("llama"), Target(tcr=0.8), format_name="dense")
    levels = dict.fromkeys(budget.topology.shapes, CompressionLevel(0.4, 5))
    finer = fill_budget(levels, budget)
    spent = sum(budget.cost(name, level) for name, level in finer.items())
    assert sum(budget.cost(name, level) for name, level in levels.items()) < budget.limit - 5
    assert budget.limit - 5 < spent <= budget.limit
    assert all(0 <= finer[name].sparsity <= 0.4 for name in levels)
