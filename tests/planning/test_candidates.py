import pytest
import torch

from srcr.models.topology import linear_weight, observe
from srcr.planning.candidates import Candidates
from srcr.planning.levels import Level, decisions
from srcr.testing import FAMILIES, tiny_model

A, B = Level(0, 4), Level(0.5, 3)


@pytest.fixture
def parts(request):
    family = request.param
    model, base = tiny_model(family), tiny_model(family)
    topology = observe(model)
    ids = torch.randint(0, 96, (6, 20), generator=torch.Generator().manual_seed(0))
    noise = {}
    for name, (rows, cols) in topology.shapes.items():
        generator = torch.Generator().manual_seed(len(noise))
        noise[name] = torch.randn(rows, cols, generator=generator) / cols**0.5

    def weights(unit, level):
        scale = 0.02 * level.num_bits
        return {
            n: linear_weight(base.get_submodule(n)) + scale * noise[n] for n in unit.names
        }  # fmt: skip

    units = decisions(topology)
    candidates = Candidates(model, topology, units, weights, ids.split(2))

    def slow(choice):
        """The whole model, run from the start."""
        other = tiny_model(family)
        for unit, level in zip(units, choice, strict=True):
            for name, new in (weights(unit, level) if level else {}).items():
                linear_weight(other.get_submodule(name)).data.copy_(new)
        with torch.no_grad():
            p, q = (m(ids).logits[:, :-1].log_softmax(-1) for m in (base, other))
        return float((p.exp() * (p - q)).sum(-1).mean())

    return candidates, units, slow


@pytest.mark.parametrize("parts", list(FAMILIES), indirect=True)
def test_candidates_are_measured_as_whole_models_are(parts):
    candidates, units, slow = parts
    n = len(units)
    first = (A,) * n
    late = (*first[:-1], B)
    middle = (*first[: n // 2], B, *first[n // 2 + 1 :])
    alone = (None,) * (n - 1) + (B,)
    assert candidates.measure((None,) * n).kl == pytest.approx(0, abs=1e-7)
    for choice in (first, late, middle, alone):
        assert candidates.measure(choice).kl == pytest.approx(slow(choice), rel=1e-3, abs=1e-6)
    candidates.stand_at(first)
    for choice in (late, middle, first, (B,) * n, alone):
        assert candidates.measure(choice).kl == pytest.approx(slow(choice), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("parts", ["llama"], indirect=True)
def test_the_hopeless_are_given_up(parts):
    candidates, units, slow = parts
    good, bad = (B,) * len(units), (Level(0, 8),) * len(units)
    pace = candidates.pace(good)
    assert pace[-1] == pytest.approx(slow(good), rel=1e-3)
    assert candidates.measure(good, pace).whole
    found = candidates.measure(bad, pace)
    assert not found.whole
    assert found.kl > 1.05 * pace[-1]


@pytest.mark.parametrize("parts", ["llama"], indirect=True)
def test_little_room_gives_the_same(parts, monkeypatch):
    candidates, units, slow = parts
    monkeypatch.setattr("srcr.planning.candidates.KEPT", 1)
    first = (A,) * len(units)
    candidates.stand_at(first)
    late = (*first[:-1], B)
    assert candidates.measure(late).kl == pytest.approx(slow(late), rel=1e-3)
