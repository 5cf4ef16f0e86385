"""Text that a model wrote before is taken as it was, and nothing else is."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from srcr.data import sampling
from srcr.data.sampling import TextPlan, write_text
from srcr.data.text_cache import TextCache
from srcr.testing import tiny_model

PLAN = TextPlan(samples=6, length=8, seed=0, prefixes=((1,),))


@dataclass
class Writer:
    """A model that counts how often it is loaded."""

    model: object = field(default_factory=lambda: tiny_model("llama"))
    vocabulary: int = 96
    precision: torch.dtype = torch.float32
    tokenizer: None = None
    loads: int = 0

    @property
    def config(self):
        return self.model.config

    def loaded(self):
        self.loads += 1
        return self.model


@pytest.fixture
def writer():
    return Writer()


@pytest.fixture
def said():
    return []


@pytest.fixture
def cache(tmp_path, said):
    return TextCache(tmp_path / "text", {"weights": "abc"}, said.append)


def test_what_was_written_is_not_written_again(writer, cache, said):
    plain = write_text(writer, PLAN)
    first, again = (write_text(writer, PLAN, cache=cache) for _ in range(2))
    assert torch.equal(plain, first)
    assert torch.equal(plain, again)
    assert writer.loads == 2
    (path,) = cache.folder.iterdir()
    assert said == [f"text written before: {path}"]
    assert torch.equal(load_file(path)["input_ids"], plain)  # a calibration source by itself


def test_rows_of_a_longer_text_are_found(writer, cache, said, monkeypatch):
    monkeypatch.setattr(sampling, "SAMPLING_ROWS", 4)
    few = write_text(writer, replace(PLAN, samples=4), cache=cache)
    many = write_text(writer, replace(PLAN, samples=8), cache=cache)
    assert torch.equal(many[:4], few)
    assert torch.equal(many, write_text(writer, replace(PLAN, samples=8)))
    write_text(writer, replace(PLAN, samples=8), cache=cache)
    assert writer.loads == 3
    assert said[0].startswith("text written before: ")
    assert said[1].endswith(".safetensors and 1 more")


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"samples": 5}, {"length": 9}, {"prefixes": ((2,),)}, {"prefixes": ()}]
)
def test_other_settings_are_other_text(writer, cache, said, change):
    write_text(writer, PLAN, cache=cache)
    write_text(writer, replace(PLAN, **change), cache=cache)
    write_text(writer, PLAN, cache=replace(cache, writer={"weights": "other"}))
    assert said == []
    assert len(list(cache.folder.iterdir())) == 3


@pytest.mark.parametrize("damage", ["bytes", "ids", "shape", "empty"])
def test_a_damaged_file_is_written_again(writer, cache, said, damage):
    expected = write_text(writer, PLAN, cache=cache)
    (path,) = cache.folder.iterdir()
    if damage == "ids":
        content = bytearray(path.read_bytes())
        content[-8] ^= 1
        path.write_bytes(content)
    elif damage == "shape":
        save_file({"input_ids": expected[:3].contiguous()}, path)
    else:
        path.write_bytes(b"no such file" if damage == "bytes" else b"")
    assert torch.equal(write_text(writer, PLAN, cache=cache), expected)
    assert len(said) == 1
    assert str(path) in said[0]
    assert said[0].endswith("written again")
    write_text(writer, PLAN, cache=cache)
    assert said[1:] == [f"text written before: {path}"]


def test_a_folder_that_cannot_be_written_stops_nothing(writer, tmp_path, said):
    (tmp_path / "file").write_text("not a folder")
    cache = TextCache(tmp_path / "file" / "text", {}, said.append)
    assert torch.equal(write_text(writer, PLAN, cache=cache), write_text(writer, PLAN))
    assert said[0].startswith(f"text cannot be kept in {cache.folder} (")
