import pytest

from srcr.compression import Calibration, Output, compress
from srcr.errors import InputError
from srcr.formats import get_format
from srcr.models.weights import open_weights
from srcr.planning.budget import Budget, parse_target
from srcr.planning.building import Space
from srcr.planning.levels import Level, Treatment
from srcr.planning.plan import fill
from srcr.testing import save_tiny_model
from srcr.types import QuantSpec, Target


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


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_counted_is_what_is_written(family, symmetric, tmp_path):
    """Loaded bytes exactly, stored bytes never less and at most 1 % more on a tiny model."""
    source = open_weights(save_tiny_model(tmp_path / "base", family))
    treatment = Treatment(quant=QuantSpec(group_size=-1, symmetric=symmetric))
    levels = dict.fromkeys(source.topology.shapes, Level(0, 4))
    if symmetric:
        levels = {n: Level(0, 3 if "0" in n else 6) for n in levels}
    plan = Space((), treatment).plan(levels, source.topology, 0)
    out = Output(tmp_path / "out", "compressed-tensors")
    rates = compress(tmp_path / "base", plan, Calibration("self", 2, 16), out, quiet=True).rates
    for target, real in (
        (Target(loaded_bytes=10**6), rates.loaded_bytes),
        (Target(stored_bytes=10**5), rates.stored_bytes),
    ):
        budget = Budget.of(target, source, treatment, get_format("compressed-tensors"))
        counted = budget.fixed + sum(budget.cost(name, level) for name, level in levels.items())
        assert real <= counted <= (1 if target.loaded_bytes else 1.01) * real


def test_zeros_count_by_tcr_alone(tmp_path):
    source = open_weights(save_tiny_model(tmp_path / "base", "llama"))
    name, fmt = next(iter(source.topology.shapes)), get_format("compressed-tensors")
    by_rate = Budget.of(Target(tcr=0.5), source, Treatment(), fmt)
    by_bytes = Budget.of(Target(stored_bytes=10**6), source, Treatment(), fmt)
    assert by_rate.cost(name, Level(0.5, 4)) == by_rate.cost(name, Level(0, 4)) / 2
    assert by_bytes.cost(name, Level(0.5, 4)) == by_bytes.cost(name, Level(0, 4))


def test_dense_checkpoints_have_one_size(tmp_path):
    source = open_weights(save_tiny_model(tmp_path / "base", "gpt2"))
    with pytest.raises(InputError, match="dense checkpoint has the same bytes"):
        Budget.of(Target(stored_bytes=10**6), source, Treatment(), get_format("dense"))


def test_what_is_left_over_goes_back_to_pruned_layers(tmp_path):
    source = open_weights(save_tiny_model(tmp_path / "base", "llama"))
    budget = Budget.of(Target(tcr=0.8), source, Treatment(), get_format("dense"))
    levels = {name: Level(0.4, 5) for name in source.topology.shapes}
    finer = fill(levels, budget)
    spent = sum(budget.cost(name, level) for name, level in finer.items())
    assert budget.limit - 5 < spent <= budget.limit
    assert all(0 <= finer[name].sparsity <= 0.4 for name in levels)
