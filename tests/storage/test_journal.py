"""What a killed run left, taken over as far as it is intact."""

import pytest
import torch

from srcr.errors import InputError
from srcr.storage.journal import Journal, finished_blocks
from srcr.storage.layout import JOURNAL
from srcr.storage.safetensors import TensorFiles, save_tensors

FINGERPRINT = {"plan": "a", "base": "b"}


@pytest.fixture
def folder(tmp_path):
    """A folder in which two blocks are finished."""
    with Journal(tmp_path) as journal:
        journal.begin(FINGERPRINT)
        for number in range(2):
            journal.add({"a": torch.full((3,), float(number))}, layers=[{"name": str(number)}])
    return tmp_path


def resumed(folder, fingerprint=FINGERPRINT):
    with Journal(folder) as journal:
        journal.begin(fingerprint)
        return journal


def test_finished_blocks_are_taken_over(folder):
    journal = resumed(folder)
    assert [entry["layers"] for entry in journal.entries] == [[{"name": "0"}], [{"name": "1"}]]
    assert float(TensorFiles(folder, [journal.file(1)]).get("a")[0]) == 1
    assert finished_blocks(folder) == 2


def test_a_run_of_other_settings_is_refused(folder):
    with pytest.raises(InputError, match="another base: give the same options"):
        resumed(folder, FINGERPRINT | {"base": "c"})
    assert len(resumed(folder).entries) == 2, "nothing was lost"


def test_what_is_torn_or_damaged_ends_what_is_taken_over(folder):
    text = (folder / JOURNAL).read_text()
    (folder / JOURNAL).write_text(text[:-10])
    assert len(resumed(folder).entries) == 1
    path = Journal(folder).file(0)
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert resumed(folder).entries == []


def test_a_folder_has_a_single_writer(folder):
    before = (folder / JOURNAL).read_bytes()
    with Journal(folder), pytest.raises(InputError, match="another run is writing"):
        Journal(folder)
    assert (folder / JOURNAL).read_bytes() == before, "who is refused changes nothing"
    with Journal(folder):
        pass


def test_what_else_is_worth_continuing(tmp_path):
    with Journal(tmp_path) as journal:
        journal.begin(FINGERPRINT)
        assert finished_blocks(tmp_path) == 0
        journal.retain()
    assert finished_blocks(tmp_path) == -1
    assert finished_blocks(tmp_path / "nowhere") == 0


def moved(folder, number):
    """The folder after a block has moved into a file of the result."""
    with Journal(folder) as journal:
        journal.begin(FINGERPRINT)
        save_tensors({"w": torch.full((4,), float(number))}, folder / "model.safetensors")
        journal.move(number, {"model.safetensors": ["w"]})
    return folder


def test_a_block_that_was_moved_is_taken_over(folder):
    moved(folder, 0)
    assert not Journal(folder).file(0).exists()
    journal = resumed(folder)
    assert len(journal.entries) == 2
    assert journal.moved(0) == ["w"]
    assert journal.moved(1) is None
    assert journal.files() == [journal.file(1)]
    assert finished_blocks(folder) == 2
    assert resumed(folder).moved(0) == ["w"], "and again"


@pytest.mark.parametrize("damage", ["other", "missing"])
def test_a_moved_block_that_is_damaged_is_not(folder, damage):
    moved(folder, 1)
    if damage == "other":
        save_tensors({"w": torch.zeros(4)}, folder / "model.safetensors")
    else:
        (folder / "model.safetensors").unlink()
    journal = resumed(folder)
    assert len(journal.entries) == 1
    assert journal.moved(1) is None
