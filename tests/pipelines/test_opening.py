"""Text that the model writes: in which precision, and that a run does not depend on what is kept of it."""

import pytest
import torch

from srcr.data.sources import calibration_request
from srcr.data.specs import Calibration
from srcr.models.checkpoint import open_model
from srcr.pipelines.compress import compress
from srcr.pipelines.opening import TextModel, load_text, text_cache, writing_memory
from srcr.pipelines.options import Output, RunOptions
from srcr.plans.plan import Recipe
from srcr.plans.specs import QuantSpec
from srcr.serialize import to_dict
from srcr.testing import tiny_model

REQUEST = calibration_request(Calibration("self", 4, 16), 0)
OPTIONS = RunOptions(quiet=True)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SRCR_CACHE", str(tmp_path / "cache"))
    tiny_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_record_is_the_same_with_and_without_what_was_written_before(folder, tmp_path, capsys):
    runs = {"first": True, "again": True, "without": False}
    records = {}
    for name, cached in runs.items():
        options = RunOptions(cache=cached)
        recipe = Recipe(None, QuantSpec(num_bits=4))
        calibration = Calibration("self", 4, 16)
        record = compress(folder, Output(tmp_path / name), recipe, calibration, options)
        records[name] = {**to_dict(record), "seconds": 0, "peak_memory_bytes": 0}
        said = "calibration text written before: " in capsys.readouterr().err
        assert said == (name == "again")
    assert records["first"] == records["again"] == records["without"]
    assert len(list((tmp_path / "cache" / "text").iterdir())) == 1


def test_a_model_in_memory_alone_is_not_hashed_for_it(folder):
    writer = TextModel(open_model(tiny_model("llama")), "cpu")
    assert text_cache(REQUEST, writer, OPTIONS, print) is None
    writer = TextModel(open_model(folder), "cpu")
    assert text_cache(REQUEST, writer, RunOptions(cache=False), print) is None
    assert text_cache(REQUEST, writer, OPTIONS, print) is not None


def test_a_user_without_a_home_has_no_cache(folder, monkeypatch, capsys):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("srcr.pipelines.opening.cache_folder", homeless)
    tokens = load_text(REQUEST, TextModel(open_model(folder), "cpu"), "text", RunOptions())
    assert tokens.input_ids.shape == (4, 16)
    assert "calibration text is not kept: Could not determine home" in capsys.readouterr().err


@pytest.mark.parametrize("fast", [True, False])
def test_text_is_written_in_what_is_fast(fast, monkeypatch):
    name = "srcr.pipelines.opening.running_precision"
    monkeypatch.setattr(name, lambda dtype, device: dtype if fast else torch.float32)
    opened = open_model(tiny_model("llama").to(torch.bfloat16))
    writer = TextModel(opened, "cpu")
    assert writer.loaded().dtype == writer.precision == (torch.bfloat16 if fast else torch.float32)
    given = opened.loaded(torch.float32)
    assert (TextModel(opened, "cpu", given).loaded() is given) == (not fast)
    assert writing_memory(writer, 64) > opened.parameters * writer.precision.itemsize
