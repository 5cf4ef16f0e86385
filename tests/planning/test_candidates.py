import pytest
import torch

from srcr.models.blockwise import copy_on, copy_sharing_weights
from srcr.models.checkpoint import open_model
from srcr.models.matrices import read_matrix
from srcr.planning.candidates import CandidateModel, Candidates
from srcr.planning.specs import MeasurementSpec
from srcr.plans.specs import CompressionLevel
from srcr.testing import FAMILIES, tiny_model

A, B = CompressionLevel(0, 4), CompressionLevel(0.5, 3)


class Setting:
    """A family's base, made-up weights of every group at every level, and the slow way to measure."""

    def __init__(self, family):
        self.family = family
        self.opened = open_model(tiny_model(family))
        self.topology = self.opened.topology
        self.groups = self.topology.groups()
        self.base = self.opened.loaded(torch.float32)
        self.ids = torch.randint(0, 96, (6, 20), generator=torch.Generator().manual_seed(0))
        self.noise = {}
        for name, (rows, cols) in self.topology.shapes.items():
            generator = torch.Generator().manual_seed(len(self.noise))
            self.noise[name] = torch.randn(rows, cols, generator=generator) / cols**0.5

    def weights(self, group, level):
        scale = 0.02 * level.num_bits
        refs = self.topology.matrices
        return {n: read_matrix(self.base, refs[n]) + scale * self.noise[n] for n in group.names}

    def candidates(self, cache_bytes=1 << 29):
        model = CandidateModel(
            copy_sharing_weights(self.base), self.topology, self.topology.groups(), self.weights
        )
        return Candidates(model, self.ids.split(2), MeasurementSpec(cache_bytes=cache_bytes))

    @torch.no_grad()
    def slow(self, assignment):
        """The whole model, run from the start."""
        other = tiny_model(self.family)
        for group, level in zip(self.groups, assignment, strict=True):
            for name, new in (self.weights(group, level) if level else {}).items():
                read_matrix(other, self.topology.matrices[name]).data.copy_(new)
        p, q = (m(self.ids).logits[:, :-1].log_softmax(-1) for m in (self.base, other))
        return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_are_measured_as_whole_models_are(family):
    setting = Setting(family)
    candidates, n = setting.candidates(), len(setting.groups)
    before = {name: tensor.clone() for name, tensor in setting.base.state_dict().items()}
    first = (A,) * n
    late = (*first[:-1], B)
    middle = (*first[: n // 2], B, *first[n // 2 + 1 :])
    alone = (None,) * (n - 1) + (B,)
    assert candidates.measure((None,) * n).kl == pytest.approx(0, abs=1e-7)
    expected = {each: setting.slow(each) for each in (first, late, middle, alone, (B,) * n)}
    assert min(expected.values()) > 1e-4
    for assignment in (first, late, middle, alone):
        kl = candidates.measure(assignment).kl
        assert kl == pytest.approx(expected[assignment], rel=1e-3, abs=1e-6)
    candidates.center_on(first)
    for assignment in (late, middle, first, (B,) * n, alone):
        kl = candidates.measure(assignment).kl
        assert kl == pytest.approx(expected[assignment], rel=1e-3, abs=1e-6)
    after = setting.base.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_what_comes_before_the_first_change_is_not_run_again():
    setting = Setting("llama")
    groups = setting.groups[len(setting.groups) // 2 :]  # the others stay as they are
    model = CandidateModel(
        copy_sharing_weights(setting.base), setting.topology, groups, setting.weights
    )
    candidates = Candidates(model, setting.ids.split(2), MeasurementSpec())
    candidates.center_on((A,) * len(groups))
    ran = []
    blocks = [model.model.get_submodule(block.name) for block in setting.topology.blocks]
    for block in blocks:
        block.mlp.register_forward_hook(lambda module, *_: ran.append(module))
    candidates.measure((A,) * len(groups))  # the base runs, once
    ran.clear()
    candidates.measure((B,) + (A,) * (len(groups) - 1))
    assert blocks[0].mlp not in ran
    assert blocks[1].mlp in ran


def test_candidates_share_the_bases_weights():
    setting = Setting("llama")
    model = CandidateModel(
        copy_sharing_weights(setting.base),
        setting.topology,
        setting.topology.groups(),
        setting.weights,
    )
    model.assign((None, B) + (None,) * (len(setting.groups) - 2))
    swapped = {setting.topology.matrices[name].parameter for name in setting.groups[1].names}
    base = dict(setting.base.named_parameters())
    for name, parameter in model.model.named_parameters():
        assert (parameter is base[name]) == (name not in swapped)


@pytest.mark.parametrize("tied", [True, False])
def test_a_copy_on_another_device_leaves_the_base_where_it_is(tied):
    base = tiny_model("llama", tie_word_embeddings=tied)
    copy = copy_on(base, "meta")
    assert {p.device.type for p in copy.parameters()} == {"meta"}
    assert {p.device.type for p in base.parameters()} == {"cpu"}
    assert {b.device.type for b in base.buffers()} == {"cpu"}
    embedding, head = copy.get_input_embeddings(), copy.get_output_embeddings()
    assert (embedding.weight is head.weight) == tied
    same = copy_on(base, "cpu")
    assert all(p is q for p, q in zip(same.parameters(), base.parameters(), strict=True))


def test_the_hopeless_are_given_up():
    setting = Setting("llama")
    candidates, n = setting.candidates(), len(setting.groups)
    good, bad = (B,) * n, (CompressionLevel(0, 8),) * n
    pace = candidates.pace(good)
    assert pace[-1] == pytest.approx(setting.slow(good), rel=1e-3)
    assert candidates.measure(good, pace).complete
    given_up = candidates.measure(bad, pace)
    assert not given_up.complete
    assert given_up.levels == ("0%+8",) * n
    whole = setting.slow(bad)
    assert whole > 2 * pace[-1]
    assert given_up.kl == pytest.approx(whole, rel=0.3), "what it would come to"


@pytest.mark.parametrize("cache_bytes", [0, 20_000])
def test_little_memory_gives_the_same(cache_bytes):
    setting = Setting("llama")
    candidates = setting.candidates(cache_bytes)
    first = (A,) * len(setting.groups)
    late = (*first[:-1], B)
    expected = setting.candidates()
    for each in (candidates, expected):
        each.center_on(first)
    for assignment in (late, first, (B,) * len(first)):
        kl = candidates.measure(assignment).kl
        assert kl == pytest.approx(expected.measure(assignment).kl, rel=1e-4)
        assert kl == pytest.approx(setting.slow(assignment), rel=1e-3)
