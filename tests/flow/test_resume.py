"""A run that was killed continues to the same bytes; what it left is never mistaken for a result."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from outputs import files
from srcr import methods
from srcr.storage.layout import JOURNAL
from srcr.testing import save_tiny_model

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("SRCR_KILLS", "2"))


@pytest.fixture
def deep(tmp_path):
    """A tiny Llama of six blocks, and calibration data."""
    folder = save_tiny_model(tmp_path / "deep", "llama", num_hidden_layers=6)
    path = tmp_path / "ids.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file({"input_ids": torch.randint(0, 96, (8, 32), generator=generator)}, path)
    return folder, path


#: A method of one's own: GPTQ that counts how often it fits a grid, and can be told to stop at a time.
STOPPING = '''
"""GPTQ, until it is told to stop."""

from dataclasses import replace

from srcr.methods.gptq import METHOD as GPTQ

shapes, stop_after, error = [], None, KeyboardInterrupt


def fit(W, spec, importance, mask):
    if stop_after is not None and len(shapes) == stop_after:
        raise error
    shapes.append(tuple(W.shape))
    return GPTQ.fit(W, spec, importance, mask)


METHOD = replace(GPTQ, name="stopping", fit=fit)
'''
#: Its fits in a block: q k v, o, gate up, down.
FITS = 4


@pytest.fixture
def stopping(tmp_path, monkeypatch):
    """The module of that method."""
    folder = tmp_path / "methods"
    folder.mkdir()
    (folder / "stopping.py").write_text(STOPPING)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(folder)])
    monkeypatch.delitem(sys.modules, "srcr.methods.stopping", raising=False)
    assert "stopping" in methods.quantizers()
    return sys.modules["srcr.methods.stopping"]


@pytest.fixture
def command(deep, tmp_path):
    model, ids = deep

    def arguments(out, *more, method="stopping"):
        return [
            "compress", model, "-o", tmp_path / out, "--calibration", ids, "--sparsity", 0.25,
            "--quant-method", method, *more,
        ]  # fmt: skip

    return arguments


@pytest.fixture
def interrupted(stopping, srcr, command):
    """A run that stops before a block, as if the user had pressed Ctrl-C."""

    def run(before, out="out", error=KeyboardInterrupt):
        stopping.stop_after, stopping.error = FITS * before, error
        result = srcr(*command(out))
        stopping.stop_after = None
        stopping.shapes.clear()
        return result

    return run


def test_an_interrupted_run_continues_to_the_same_bytes(srcr, command, interrupted, tmp_path):
    result = interrupted(before=3)
    assert result.code == 130
    assert "3 finished blocks are in" in result.error()
    assert "--resume continues" in result.error()
    assert not (tmp_path / "out").exists()
    refused = srcr(*command("out"))
    assert refused.code == 2
    assert "--resume to continue it" in refused.error()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").glob("block-*")}
    assert len(before) == 3
    resumed = srcr(*command("out", "--resume"))
    assert resumed.code == 0
    assert "3 blocks were finished before" in resumed.err
    assert srcr(*command("whole")).code == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_finished_blocks_are_not_done_again(srcr, command, stopping, interrupted):
    interrupted(before=4)
    assert srcr(*command("out", "--resume")).code == 0
    assert len(stopping.shapes) == 2 * FITS
    assert srcr(*command("whole")).code == 0
    assert len(stopping.shapes) == (2 + 6) * FITS


@pytest.mark.parametrize("damage", ["block", "missing", "torn", "garbage"])
def test_what_is_damaged_is_seen_and_done_again(srcr, command, interrupted, tmp_path, damage):
    interrupted(before=4)
    partial = tmp_path / "out.partial"
    path = partial / "block-00001.tensors"
    if damage == "block":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    elif damage == "missing":
        path.unlink()
    else:
        lines = (partial / JOURNAL).read_text().splitlines(keepends=True)
        lines[2] = lines[2][:40] if damage == "torn" else "no JSON\n"
        (partial / JOURNAL).write_text("".join(lines[: 3 if damage == "torn" else None]))
    resumed = srcr(*command("out", "--resume"))
    assert resumed.code == 0
    assert "1 blocks were finished before" in resumed.err
    assert srcr(*command("whole")).code == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_other_settings_are_not_continued(srcr, command, interrupted, tmp_path):
    interrupted(before=2)
    other = srcr(*command("out", "--resume", "--bits", 3))
    assert other.code == 2
    assert "another plan" in other.error()
    other = srcr(*command("out", "--resume", "--samples", 4))
    assert "another calibration" in other.error()
    assert len(list((tmp_path / "out.partial").glob("block-*"))) == 2, "nothing was lost"
    assert srcr(*command("out", "--overwrite", "--bits", 3)).code == 0
    assert srcr(*command("fresh", "--bits", 3)).code == 0
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


def test_done_is_done(srcr, command, stopping, tmp_path):
    assert srcr(*command("out", "--resume")).code == 0, "nothing to continue: starts afresh"
    before = (tmp_path / "out/srcr.json").stat().st_mtime_ns
    again = srcr(*command("out", "--resume"))
    assert again.code == 0
    assert "already done" in again.err
    assert (tmp_path / "out/srcr.json").stat().st_mtime_ns == before
    other = srcr(*command("out", "--resume", "--bits", 3))
    assert other.code == 2
    assert "is finished, with another plan" in other.error()


def test_a_full_disk_keeps_what_is_finished(srcr, command, interrupted, tmp_path):
    result = interrupted(before=2, error=OSError(28, "No space left on device"))
    assert result.code == 1
    assert "No space left" in result.error()
    assert "2 finished blocks" in result.error()
    assert srcr(*command("out", "--resume")).code == 0


def test_an_interrupt_before_the_first_block_leaves_nothing(interrupted, tmp_path):
    result = interrupted(before=0)
    assert result.code == 130
    assert "nothing was left behind" in result.error()
    assert not list(tmp_path.glob("out*"))


def test_two_runs_into_one_folder(srcr, command, stopping, tmp_path):
    """The second one is refused; a lock whose owner is gone is no obstacle."""
    (tmp_path / "out.partial").mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c",
         "import sys, time; from pathlib import Path; from srcr.storage.journal import Journal; "
         "journal = Journal(Path(sys.argv[1])); print('locked', flush=True); time.sleep(600)",
         str(tmp_path / "out.partial")],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == b"locked\n"
        for option in ("--resume", "--overwrite"):
            second = srcr(*command("out", option))
            assert second.code == 2
            assert "another run is writing" in second.error()
        assert (tmp_path / "out.partial" / JOURNAL).exists()
    finally:
        holder.kill()
        holder.wait()
    assert srcr(*command("out", "--overwrite")).code == 0


def test_kill_9_at_random_moments(srcr, command, tmp_path):
    """Killed again and again, from its start to its end: the same bytes as without."""
    assert srcr(*command("whole", method="gptq")).code == 0
    expected = files(tmp_path / "whole")
    rng = random.Random(0)
    for number in range(KILLS):
        out = f"out{number}"
        process = [sys.executable, "-m", "srcr", *map(str, command(out, "--resume", method="gptq"))]
        run = subprocess.Popen(process, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        partial = tmp_path / f"{out}.partial"
        while run.poll() is None and not (partial / JOURNAL).exists():
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 1.0))
        run.send_signal(signal.SIGKILL)
        run.wait()
        resumed = srcr(*command(out, "--resume", method="gptq"))
        assert resumed.code == 0, resumed.err
        assert files(tmp_path / out) == expected
        assert not partial.exists()
