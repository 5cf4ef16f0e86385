"""A compressed model that is trained: same format, zeros, bits, bytes; never worse; killed and resumed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from srcr.data.specs import RecoveryText
from srcr.errors import InputError
from srcr.formats import detect
from srcr.pipelines.compress import compress
from srcr.pipelines.evaluate import evaluate
from srcr.pipelines.export import export
from srcr.pipelines.options import Output, RunOptions
from srcr.pipelines.recover import recover
from srcr.pipelines.training import Recovery
from srcr.plans.plan import Recipe
from srcr.plans.recovery import RecoverySpec
from srcr.plans.specs import Override, PruneSpec, QuantSpec
from srcr.plans.structures import StructureSpec
from srcr.recovery import distill
from srcr.serialize import from_yaml
from srcr.storage.layout import RECORD
from srcr.testing import save_tiny_model

pytestmark = pytest.mark.slow

QUIET = RunOptions(quiet=True)
SPEC = RecoverySpec(steps=40, batch=16, lr=2e-3, scale_lr=3e-3)
#: Where it matters that there was training, not how much it gave back.
SHORT = RecoverySpec(steps=8, batch=16, lr=3e-3, scale_lr=4e-3)


def ids(path, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    save_file({"input_ids": torch.randint(3, 96, (rows, 24), generator=generator)}, path)
    return str(path)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Token ids to train on, to choose by, and to calibrate."""
    folder = tmp_path_factory.mktemp("texts")
    train = ids(folder / "train.safetensors", 320, 0)
    return RecoveryText((train,), held_out=ids(folder / "held.safetensors", 48, 1))


def compressed(base, texts, out, prune=0.25, bits=3, symmetric=True, structures=None, **output):
    quant = None if bits is None else QuantSpec("rtn", bits, 8, symmetric)
    recipe = Recipe(PruneSpec("magnitude", prune) if prune else None, quant, structures=structures)
    compress(str(base), Output(out, **output), recipe, texts.sources[0], QUIET)
    return out


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def small(tmp_path_factory, texts):
    """A tiny Llama and what 25 % and 3 bits leave of it."""
    folder = tmp_path_factory.mktemp("small")
    base = save_tiny_model(folder / "base", "llama")
    return base, compressed(base, texts, folder / "compressed")


@pytest.fixture(scope="module")
def better(small, texts, tmp_path_factory):
    """The same after training."""
    out = tmp_path_factory.mktemp("better") / "out"
    return out, recover(str(small[0]), small[1], out, SPEC, texts, QUIET)


def test_training_gives_back_and_the_record_says_what(small, better, texts):
    out, record = better
    (recovery,) = record.recoveries
    assert recovery.accepted
    assert recovery.after.value < 0.8 * recovery.before.value
    assert recovery.change.high < 0
    assert (recovery.steps, recovery.source) == (40, small[1].name)
    assert recovery.tokens == 40 * 16 * 23
    assert recovery.text.source == Path(texts.sources[0]).name
    assert [point.step for point in recovery.curve] == list(range(0, 41, 2))
    assert recovery.best_step == min(recovery.curve, key=lambda p: p.kl).step
    assert from_yaml(type(record), out / RECORD) == record
    assert record.verification.difference < 1e-4
    assert record.plan_fingerprint == from_yaml(type(record), small[1] / RECORD).plan_fingerprint


def test_an_evaluation_sees_the_gain(small, better, tmp_path):
    text = ids(tmp_path / "text.safetensors", 16, 2)
    before, after = evaluate(str(small[0]), [small[1], better[0]], text, options=QUIET)
    assert after.divergence.kl.value < 0.85 * before.divergence.kl.value
    assert after.rates.tcr == before.rates.tcr
    assert after.rates.stored_bytes == before.rates.stored_bytes


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"symmetric": False}),
        ("llama", {"prune": 0.5, "bits": None, "format": "dense"}),
        ("gemma3", {"bits": 2}),
        ("phi3", {"prune": 0}),
        ("opt", {}),
    ],
)
def test_format_zeros_bits_and_bytes_stay(family, options, tmp_path, texts):
    base = save_tiny_model(tmp_path / "base", family, torch.bfloat16)
    before = compressed(base, texts, tmp_path / "before", **options)
    recover(str(base), before, tmp_path / "after", SHORT, texts, QUIET)
    after = tmp_path / "after"
    assert {p.name for p in before.iterdir()} == {p.name for p in after.iterdir()}
    sizes = [(f / "model.safetensors").stat().st_size for f in (before, after)]
    assert sizes[0] == sizes[1]
    assert json.loads((before / "config.json").read_text()) == json.loads(
        (after / "config.json").read_text()
    )
    assert weights(before) != weights(after)
    old, new = (detect(folder).read(folder) for folder in (before, after))
    record = from_yaml(type(_record(before)), after / RECORD)
    for layer in record.layers:
        was, now = old.weight(layer.name), new.weight(layer.name)
        if layer.sparsity:
            assert not now[was == 0].any()
        assert float((now == 0).float().mean()) == pytest.approx(layer.zeros)
    zeros = np.average(
        [layer.zeros for layer in record.layers],
        weights=[np.prod(layer.shape) for layer in record.layers],
    )
    assert record.rates.zeros == pytest.approx(zeros)
    loaded = AutoModelForCausalLM.from_pretrained(after, dtype=torch.float32)
    assert torch.isfinite(loaded(torch.arange(3, 20)[None]).logits).all()


def _record(folder):
    from srcr.records.run import RunRecord

    return from_yaml(RunRecord, folder / RECORD)


def test_structures_are_trained_too(tmp_path, texts):
    base = save_tiny_model(tmp_path / "base", "llama")
    before = compressed(
        base, texts, tmp_path / "before", 0, None, structures=StructureSpec(channels=0.34, layers=1)
    )
    spec = RecoverySpec(steps=20, batch=16, value_lr=1e-3)
    record = recover(str(base), before, tmp_path / "after", spec, texts, QUIET)
    assert record.recoveries[-1].accepted
    assert record.structures is not None
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "after").config.num_hidden_layers == 1


@pytest.mark.parametrize("stage", ["blockwise", "both"])
def test_blocks_are_tuned_where_that_lowers_kl(stage, small, texts, tmp_path):
    spec = RecoverySpec(stage, steps=6, batch=16, lr=1e-3, block_steps=20)
    record = recover(str(small[0]), small[1], tmp_path / "out", spec, texts, QUIET)
    (recovery,) = record.recoveries
    assert any(recovery.blocks)
    assert recovery.accepted
    assert recovery.steps == (6 if stage == "both" else 0)
    assert len(recovery.curve) == (7 if stage == "both" else 1)


def test_where_training_does_not_help_the_input_comes_back_byte_for_byte(small, texts, tmp_path):
    spec = RecoverySpec(steps=3, batch=2, lr=1.0, scale_lr=1.0)
    record = recover(str(small[0]), small[1], tmp_path / "out", spec, texts, QUIET)
    assert not record.recoveries[-1].accepted
    assert weights(tmp_path / "out") == weights(small[1])
    before = _record(small[1])
    assert record.layers == before.layers
    assert record.rates == before.rates
    assert "no gain" in record.recoveries[-1].summary


def test_training_again_keeps_the_record_of_both(better, small, texts, tmp_path):
    spec = RecoverySpec(steps=5, batch=4, lr=1e-3)
    record = recover(str(small[0]), better[0], tmp_path / "again", spec, texts, QUIET)
    assert [each.steps for each in record.recoveries] == [40, 5]
    assert record.recoveries[1].source == better[0].name


def test_a_run_is_repeated_to_the_byte_and_what_is_finished_is_known(
    better, small, texts, tmp_path
):
    out, record = better
    recover(str(small[0]), small[1], tmp_path / "again", SPEC, texts, QUIET)
    assert weights(tmp_path / "again") == weights(out)
    known = recover(str(small[0]), small[1], Output(out, resume=True), SPEC, texts, QUIET)
    assert known == record
    other = RecoverySpec(steps=3)
    with pytest.raises(InputError, match="is finished, and not what"):
        recover(str(small[0]), small[1], Output(out, resume=True), other, texts, QUIET)
    with pytest.raises(InputError, match="exists"):
        recover(str(small[0]), small[1], out, SPEC, texts, QUIET)


def interrupted_at(monkeypatch, number):
    """Ctrl-C in so many steps."""
    train_step = distill.train_step

    def step(setting, optimizer, step, steps):
        if step == number:
            raise KeyboardInterrupt
        return train_step(setting, optimizer, step, steps)

    monkeypatch.setattr(distill, "train_step", step)


def test_an_interrupted_run_goes_on_to_the_same_bytes(better, small, texts, tmp_path, monkeypatch):
    """At its first step, later, and once more before anything new was kept."""
    out = tmp_path / "out"
    for step in (0, 19, 20):
        with monkeypatch.context() as patch:
            interrupted_at(patch, step)
            with pytest.raises(KeyboardInterrupt, match="--resume continues"):
                recover(str(small[0]), small[1], Output(out, resume=step > 0), SPEC, texts, QUIET)
        assert (tmp_path / "out.partial").is_dir()
    with pytest.raises(InputError, match="another training"):
        recover(
            str(small[0]), small[1], Output(out, resume=True), RecoverySpec(steps=3), texts, QUIET
        )
    record = recover(str(small[0]), small[1], Output(out, resume=True), SPEC, texts, QUIET)
    assert weights(out) == weights(better[0])
    assert not (tmp_path / "out.partial").exists()
    assert [p.kl for p in record.recoveries[0].curve] == [
        p.kl for p in better[1].recoveries[0].curve
    ]


def test_what_was_only_pruned_is_trained_beside_what_has_codes(small, texts, tmp_path):
    recipe = Recipe(
        PruneSpec("magnitude", 0.25),
        QuantSpec("rtn", 3, 8),
        overrides={"*.down_proj": Override(bits=16)},
    )
    before = tmp_path / "before"
    compress(str(small[0]), Output(before), recipe, texts.sources[0], QUIET)
    record = recover(str(small[0]), before, tmp_path / "after", SHORT, texts, QUIET)
    assert record.recoveries[-1].accepted
    old, new = (detect(folder).read(folder) for folder in (before, tmp_path / "after"))
    for name in (layer.name for layer in record.layers):
        was, now = old.weight(name), new.weight(name)
        assert not now[was == 0].any()
        assert not torch.equal(was, now)


def test_another_original_is_said_aloud_and_recorded(small, texts, tmp_path):
    other = save_tiny_model(tmp_path / "other", "llama", seed=1)
    spec = RecoverySpec(steps=2, batch=4)
    record = recover(str(other), small[1], tmp_path / "out", spec, texts, QUIET)
    assert "not the file that was compressed" in record.notes[-1]


def test_blocks_that_the_original_has_not_are_not_tuned(tmp_path, texts):
    base = save_tiny_model(tmp_path / "base", "llama")
    before = compressed(base, texts, tmp_path / "b", 0, 3, structures=StructureSpec(layers=1))
    spec = RecoverySpec("both", steps=2)
    with pytest.raises(InputError, match="which has 2, and 1 are left"):
        recover(str(base), before, tmp_path / "out", spec, texts, QUIET)


def test_minutes_become_steps_that_can_be_repeated(small, texts, tmp_path):
    spec = RecoverySpec(minutes=0.05, batch=16, lr=2e-3)
    record = recover(str(small[0]), small[1], tmp_path / "timed", spec, texts, QUIET)
    (recovery,) = record.recoveries
    assert recovery.steps > 3
    assert recovery.seconds < 30


def test_compress_trains_before_it_writes(small, texts, tmp_path, monkeypatch):
    recipe = Recipe(PruneSpec("magnitude", 0.25), QuantSpec("rtn", 3, 8))

    def run(out, **output):
        return compress(
            str(small[0]),
            Output(out, **output),
            recipe,
            texts.sources[0],
            QUIET,
            Recovery(SHORT, texts),
        )

    record = run(tmp_path / "out")
    (recovery,) = record.recoveries
    assert recovery.accepted
    assert recovery.source is None
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in small[1].iterdir()}
    assert record.rates.sparsity == _record(small[1]).rates.sparsity
    with monkeypatch.context() as patch:
        interrupted_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "again")
    run(tmp_path / "again", resume=True)
    assert weights(tmp_path / "again") == weights(tmp_path / "out")
    assert run(tmp_path / "out", resume=True) == record
    untrained = Output(small[1], resume=True)
    with pytest.raises(InputError, match="with another training and training text"):
        compress(str(small[0]), untrained, recipe, texts.sources[0], QUIET, Recovery(SHORT, texts))


def test_a_loss_that_is_not_finite_stops_and_the_last_good_state_is_kept(
    small, texts, tmp_path, monkeypatch
):
    accumulate = distill.train_step.__globals__["accumulate"]
    calls = []

    def broken(setting, rows):
        calls.append(rows)
        loss = accumulate(setting, rows)
        return loss if len(calls) < 15 else type(loss)(float("nan"), loss.tokens)

    monkeypatch.setitem(distill.train_step.__globals__, "accumulate", broken)
    record = recover(str(small[0]), small[1], tmp_path / "out", SPEC, texts, QUIET)
    (recovery,) = record.recoveries
    assert recovery.stopped == "the loss of step 15 is not finite"
    assert recovery.steps == 14
    assert recovery.accepted


def test_fewer_rows_together_where_memory_runs_out(small, texts, tmp_path, monkeypatch):
    predict = distill.train_step.__globals__["predict"]

    def small_memory(model, input_ids, in_pieces=True):
        if len(input_ids) > 1 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("no")
        return predict(model, input_ids, in_pieces)

    spec = RecoverySpec(steps=3, batch=4, lr=2e-3)
    whole = recover(str(small[0]), small[1], tmp_path / "whole", spec, texts, QUIET)
    monkeypatch.setitem(distill.train_step.__globals__, "predict", small_memory)
    record = recover(str(small[0]), small[1], tmp_path / "out", spec, texts, QUIET)
    looks = [[point.kl for point in each.recoveries[0].curve] for each in (record, whole)]
    assert looks[0] == pytest.approx(looks[1], rel=0.02)


def test_bad_input_is_refused_and_nothing_is_left(small, texts, tmp_path):
    base, folder = small
    other = save_tiny_model(tmp_path / "other", "llama", vocab_size=97)
    out = tmp_path / "out"

    def refused(match, *arguments, spec=SPEC, text=texts, options=QUIET):
        with pytest.raises(InputError, match=match):
            recover(*arguments, out, spec, text, options)
        assert not out.exists()
        assert not (tmp_path / "out.partial").exists()

    refused("vocabulary of 96", str(other), folder)
    refused("no srcr.json", str(base), base)
    refused("give steps or minutes", str(base), folder, spec=RecoverySpec())
    dense = tmp_path / "dense"
    export(folder, Output(dense, "dense"), QUIET)
    refused("not the codes", str(base), dense)
    same = RecoveryText(texts.sources, held_out=texts.sources[0])
    refused("share sequences", str(base), folder, text=same)
    short = RecoveryText(texts.sources, held_out=torch.arange(3, 51).view(2, 24).tolist())
    refused("2 held-out sequences", str(base), folder, text=short)
    refused("too little to train", str(base), folder, options=RunOptions(quiet=True, memory="1MB"))
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    (damaged / "model.safetensors").write_bytes(weights(folder)[:100])
    refused("damaged", str(base), damaged)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"steps": 0}, "steps 0"),
        ({"minutes": 0}, "minutes 0"),
        ({"batch": 0}, "batch 0"),
        ({"lr": -1}, "lr -1"),
        ({"lr": float("nan")}, "lr nan"),
    ],
)
def test_specs_that_cannot_be(values, match):
    with pytest.raises(InputError, match=match):
        RecoverySpec(**values)


def test_one_file_is_a_recovery(small, texts, srcr, tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    asked = ("--calibration", texts.sources[0], "--held-out", texts.held_out, "--steps", "2")
    result = srcr("recover", *small, "-o", first, *asked, "--lr", "0.002")
    assert result.code == 0, result.err
    run = yaml.safe_load((first / "run.yaml").read_text())
    assert (run["steps"], run["batch"], run["lr"], run["seq_len"]) == (2, 8, 0.002, 512)
    assert "minutes" not in run
    places = {
        "base": str(small[0]), "compressed": str(small[1]), "out": str(again),
        "calibration": texts.sources[0], "held_out": texts.held_out,
    }  # fmt: skip
    config = tmp_path / "moved.yaml"
    config.write_text(yaml.safe_dump(run | places))
    result = srcr("recover", "--config", config)
    assert result.code == 0, result.err
    assert weights(again) == weights(first)
    assert (again / "run.yaml").read_bytes() == (first / "run.yaml").read_bytes()


def test_two_processes_train_as_one_does(small, texts, srcr, tmp_path):
    """By gloo, each with half of the rows."""
    arguments = [
        "recover", str(small[0]), str(small[1]), "--calibration", texts.sources[0],
        "--held-out", texts.held_out, "--steps", "6", "--batch", "1", "--lr", "0.002",
    ]  # fmt: skip
    alone = srcr(*arguments, "-o", tmp_path / "alone", "--processes", "1")
    command = [sys.executable, "-m", "srcr", *arguments, "-o", tmp_path / "two", "--processes", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    two = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    for printed in (alone.out, two.stdout):
        assert printed.count("KL on held-out text, after") == 1
    records = [_record(tmp_path / name).recoveries[0] for name in ("alone", "two")]
    alone, together = records
    assert alone.tokens == together.tokens
    for field in ("kl", "loss"):
        pairs = [[getattr(point, field) or 0.0 for point in each.curve] for each in records]
        assert pairs[0] == pytest.approx(pairs[1], rel=1e-3)
