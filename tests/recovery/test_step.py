"""A step: its rows, its learning rate, and gradients that do not depend on how it is cut."""

from dataclasses import replace

import pytest
import torch

from srcr.data.tokens import Tokens
from srcr.engine.activations import ActivationFile
from srcr.models.checkpoint import open_model
from srcr.pipelines.training import make_student
from srcr.plans.plan import Recipe
from srcr.plans.recovery import RecoverySpec
from srcr.plans.specs import PruneSpec, QuantSpec
from srcr.recovery.losses import LOSSES, cakld, forward_kl
from srcr.recovery.step import (
    Setting,
    accumulate,
    held_out,
    learning_rate,
    optimizer_of,
    rows_of_step,
    train_step,
)
from srcr.recovery.teacher import Teacher
from srcr.testing import tiny_model
from srcr.testing.checkpoints import compressed_checkpoint

CPU = torch.device("cpu")


def rows(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Tokens.of([torch.randint(3, 96, (n,), generator=generator).tolist() for n in lengths])


@pytest.fixture
def setting(tmp_path):
    """A tiny Llama and what is left of it at 25 % and 3 bits."""
    opened = open_model(tiny_model("llama"))
    recipe = Recipe(PruneSpec(sparsity=0.25), QuantSpec(num_bits=3, group_size=8))
    student = make_student(opened, compressed_checkpoint(opened, recipe), CPU)
    student.write()
    with ActivationFile(tmp_path, CPU) as states:
        teacher = Teacher(opened.loaded(torch.float32), True, states)
        tokens = rows([24, 24, 12, 24, 12, 24])
        yield Setting(student, teacher, tokens, RecoverySpec(steps=4, batch=3), torch.float32)


def test_every_epoch_takes_every_row_once_in_another_order():
    taken = [row for step in range(10) for row in rows_of_step(step, 3, 6, seed=0)]
    epochs = [taken[i : i + 6] for i in range(0, 30, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert rows_of_step(7, 3, 6, seed=0) == taken[21:24]
    assert [rows_of_step(0, 6, 6, seed=s) for s in (0, 1)] != [taken[:6]] * 2


def test_learning_rates_rise_then_fall_to_nothing():
    shares = [learning_rate(step, 100) for step in range(100)]
    assert shares[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert shares[5:] == sorted(shares[5:], reverse=True)
    assert 0 < shares[-1] < 1e-3
    assert learning_rate(0, 1) == 1.0


def gradients(setting):
    result = {
        name: parameter.grad.clone()
        for name, parameter in setting.student.model.named_parameters()
        if parameter.grad is not None
    }
    setting.student.drop_gradients()
    return result


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_the_whole_batch_at_once(setting, loss):
    """However rows are put together and positions are cut, against plain autograd."""
    spec = replace(setting.spec, loss=loss)
    plain = [0, 1, 3]  # of one length
    setting = replace(setting, spec=spec)
    value = accumulate(setting, plain)
    found = gradients(setting)
    ids = setting.tokens.input_ids[plain]
    teacher = setting.teacher.model(ids).logits[:, :-1].log_softmax(-1)
    student = setting.student.model(ids).logits[:, :-1].log_softmax(-1)
    expected = LOSSES[loss](teacher.detach(), student).mean()
    expected.backward()
    assert value.mean == pytest.approx(float(expected.detach()), rel=1e-5)
    assert value.tokens == 69
    for name, gradient in gradients(setting).items():
        assert torch.allclose(found[name], gradient, atol=1e-6), name


def test_rows_of_different_lengths_and_few_tokens_together(setting):
    whole = accumulate(setting, [0, 2, 4])
    found = gradients(setting)
    apart = accumulate(replace(setting, together=1), [0, 2, 4])
    assert whole.mean == pytest.approx(apart.mean, rel=1e-5)
    assert whole.tokens == 23 + 11 + 11
    for name, gradient in gradients(setting).items():
        assert torch.allclose(found[name], gradient, atol=1e-6)


def test_teachers_that_cannot_be_cut_run_whole(setting):
    whole = replace(setting, teacher=Teacher(setting.teacher.model, False, setting.teacher.states))
    assert accumulate(whole, [0, 1]).mean == pytest.approx(accumulate(setting, [0, 1]).mean)


def test_the_teacher_runs_once_for_each_row(setting):
    accumulate(setting, [0, 2])
    kept = len(setting.teacher.states)
    accumulate(setting, [2, 0])
    assert len(setting.teacher.states) == kept == 2
    held_out(setting.student, setting.teacher, rows([24, 24], seed=1))
    assert len(setting.teacher.states) == 4


def test_held_out_kl_is_that_of_the_logits(setting):
    tokens = rows([12, 24, 12], seed=2)
    kl, count = held_out(setting.student, setting.teacher, tokens)
    assert count.tolist() == [11, 23, 11]
    for number, row in enumerate(tokens.rows()):
        with torch.no_grad():
            teacher, student = (
                model(row[None]).logits[0, :-1].double().log_softmax(-1)
                for model in (setting.teacher.model, setting.student.model)
            )
        expected = (teacher.exp() * (teacher - student)).sum()
        assert kl[number] == pytest.approx(float(expected), rel=1e-4)


def test_steps_lower_the_loss_and_change_neither_embeddings_nor_the_teacher(setting):
    teacher = {n: p.clone() for n, p in setting.teacher.model.named_parameters()}
    table = setting.student.model.get_input_embeddings().weight.clone()
    norm = setting.student.model.model.norm.weight.clone()
    optimizer = optimizer_of(setting.student, setting.spec)
    losses = [train_step(setting, optimizer, step, 60).mean for step in range(60)]
    assert sum(losses[-6:]) < 0.7 * sum(losses[:6])
    assert all(torch.equal(p, teacher[n]) for n, p in setting.teacher.model.named_parameters())
    assert torch.equal(setting.student.model.get_input_embeddings().weight, table)
    assert not torch.equal(setting.student.model.model.norm.weight, norm)


def test_scales_alone_leave_codes_as_they_are(setting):
    setting = replace(setting, spec=replace(setting.spec, train="scales", scale_lr=0.05))
    before = setting.student.results()
    optimizer = optimizer_of(setting.student, setting.spec)
    for step in range(4):
        train_step(setting, optimizer, step, 4)
    after = setting.student.results()
    assert all(torch.equal(after[n].codes, before[n].codes) for n in before)
    assert any(not torch.equal(after[n].grid.scale, before[n].grid.scale) for n in before)


def test_losses_are_nothing_for_the_teacher_itself():
    logits = torch.randn(2, 3, 9).log_softmax(-1)
    other = torch.randn(2, 3, 9).log_softmax(-1)
    for loss in (forward_kl, cakld):
        assert loss(logits, logits).abs().max() < 1e-6
        assert (loss(logits, other) > 0).all()
