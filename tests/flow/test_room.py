"""A result takes its room once while it is written; a run that is stopped then goes on to the same bytes."""

import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from outputs import files
from srcr import formats
from srcr.storage.layout import JOURNAL
from srcr.storage.safetensors import TensorFiles
from srcr.testing import save_tiny_model

#: Formats that stop a run while it writes, verifies or records, and measure the folder on the way.
STOPPING = '''
"""A format that stops where it is told to, and measures its folder."""

from dataclasses import dataclass, replace
from pathlib import Path

from srcr.formats import get_format

OTHER = get_format("{other}")
stop, used = None, []


def room(folder):
    """Bytes that the files of a folder take on disk."""
    return sum(path.stat().st_blocks * 512 for path in Path(folder).iterdir())


@dataclass(frozen=True)
class Watching:
    """Who moves blocks, with what lies on disk before each goes."""

    mover: object
    folder: Path

    def moved(self, block):
        return self.mover.moved(block)

    def move(self, block, places):
        used.append(room(self.folder))
        if stop == ("before move", block):
            raise KeyboardInterrupt
        self.mover.move(block, places)
        if stop == ("move", block):
            raise KeyboardInterrupt


def write(checkpoint, folder):
    if checkpoint.moving is not None:
        checkpoint = replace(checkpoint, moving=Watching(checkpoint.moving, folder))
    OTHER.write(checkpoint, folder)
    used.append(room(folder))


def load(folder, dtype):
    if stop == ("verify", 0):
        raise KeyboardInterrupt
    return OTHER.load(folder, dtype)


def loaded_bytes(folder, contents):
    if stop == ("record", 0):
        raise KeyboardInterrupt
    return OTHER.loaded_bytes(folder, contents)


FORMAT = replace(
    OTHER, name="stopping", write=write, load=load, loaded_bytes=loaded_bytes,
    recognises=lambda folder: False,
)
'''
BLOCKS = 6
#: Bytes of the smallest file on common file systems: how far a count of blocks is from one of bytes.
GRAIN = 4096

pytestmark = pytest.mark.slow


@pytest.fixture
def model(tmp_path):
    """A tiny Llama of six blocks, each of many blocks of a disk, and calibration data."""
    folder = save_tiny_model(
        tmp_path / "deep", "llama", num_hidden_layers=BLOCKS, hidden_size=64, intermediate_size=256
    )
    path = tmp_path / "ids.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file({"input_ids": torch.randint(0, 96, (4, 16), generator=generator)}, path)
    return folder, path


@pytest.fixture
def stopping(tmp_path, monkeypatch):
    """Makes the format, over another; its module."""

    def make(other):
        folder = tmp_path / "formats"
        folder.mkdir()
        (folder / "stopping.py").write_text(STOPPING.replace("{other}", other))
        monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(folder)])
        monkeypatch.delitem(sys.modules, "srcr.formats.stopping", raising=False)
        assert "stopping" in formats.formats()
        return sys.modules["srcr.formats.stopping"]

    return make


@pytest.fixture
def command(model, tmp_path):
    folder, ids = model

    def arguments(out, *more):
        return [
            "compress", folder, "-o", tmp_path / out, "--calibration", ids, "--sparsity", 0.25,
            "--quant-method", "rtn", "--prune-method", "magnitude", "--bits", 8,
            "--format", "stopping", *more,
        ]  # fmt: skip

    return arguments


@pytest.mark.parametrize("other", ["compressed-tensors", "gptq", "dense"])
def test_a_result_takes_its_room_once(srcr, command, stopping, tmp_path, other):
    """At most one block lies there twice."""
    module = stopping(other)
    assert srcr(*command("out")).code == 0
    *moves, result = module.used
    assert len(moves) == BLOCKS
    a_block = result / BLOCKS
    peak = max(module.used)
    # Codes and masks in the journal are no larger than what any of the formats makes of them.
    assert peak <= result + a_block + BLOCKS * GRAIN
    assert not list((tmp_path / "out").glob("block-*"))


STOPS = [
    ("compressed-tensors", ("before move", 0)),
    ("compressed-tensors", ("move", 3)),
    ("compressed-tensors", ("verify", 0)),
    ("compressed-tensors", ("record", 0)),
    ("dense", ("move", BLOCKS - 1)),
    ("archive", ("verify", 0)),  # written as a whole
    ("archive", ("record", 0)),
]


@pytest.mark.parametrize(
    ("other", "stop"), STOPS, ids=[f"{other}-{stop[0]}" for other, stop in STOPS]
)
def test_stopped_while_writing_goes_on_to_the_same_bytes(
    srcr, command, stopping, tmp_path, other, stop
):
    module = stopping(other)
    module.stop = stop
    result = srcr(*command("out"))
    assert result.code == 130
    assert f"{BLOCKS} finished blocks are in" in result.error()
    module.stop = None
    resumed = srcr(*command("out", "--resume"))
    assert resumed.code == 0, resumed.err
    assert f"{BLOCKS} blocks were finished before" in resumed.err
    assert srcr(*command("whole")).code == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["tensor", "missing"])
def test_a_moved_block_that_is_damaged_is_done_again(srcr, command, stopping, tmp_path, damage):
    module = stopping("compressed-tensors")
    module.stop = ("move", 3)
    assert srcr(*command("out")).code == 130
    module.stop = None
    partial = tmp_path / "out.partial"
    shard = partial / "model.safetensors"
    line = next(
        line for line in map(json.loads, (partial / JOURNAL).read_text().splitlines())
        if line.get("moved") == 2
    )  # fmt: skip
    assert "model.safetensors" in line["places"]
    if damage == "missing":
        shard.unlink()
    else:
        name = line["places"]["model.safetensors"][0]
        data = bytearray(shard.read_bytes())
        header = 8 + int.from_bytes(data[:8], "little")
        data[header + TensorFiles(partial, [shard]).entries[name].start] ^= 1
        shard.write_bytes(data)
    resumed = srcr(*command("out", "--resume"))
    assert resumed.code == 0, resumed.err
    if damage == "tensor":
        assert "2 blocks were finished before" in resumed.err
    assert srcr(*command("whole")).code == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")
