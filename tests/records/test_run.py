"""The record of a run, and what is read of those of other versions."""

import json

import pytest

from srcr.errors import InputError
from srcr.records.run import LayerRecord, Rates, RunRecord, RunSummary
from srcr.records.text import TextRecord
from srcr.serialize import from_dict, from_yaml, to_dict, to_yaml

RECORD = RunRecord(
    base="base", base_sha256="00", command="compress", format="dense",
    rates=Rates(0.25, 4.0, 0.8125, 0.3, 10, 5, 5, "transformers", "srcr.json"),
    plan_fingerprint="11", calibration=TextRecord("self", 3, 8, "ff", ("a", "b", "c")),
    layers=(LayerRecord("a", (2, 3), 0.25, 4, 0.8125, 0.3, 3.5, 3e-7),), versions={"torch": "2"},
    seconds=1.5, peak_memory_bytes=7, notes=("first", "second"),
)  # fmt: skip


def test_a_record_survives_a_file(tmp_path):
    path = tmp_path / "srcr.json"
    path.write_text(to_yaml(RECORD), encoding="utf-8")
    assert from_yaml(RunRecord, path) == RECORD
    assert from_dict(RunRecord, json.loads(json.dumps(to_dict(RECORD)))) == RECORD


def test_a_text_says_how_much_it_is():
    full, padded = (TextRecord("a", 32, 256, "0", None, n, (1,)) for n in (32 * 256, 5000))
    assert full.size == "32 x 256 tokens"
    assert padded.size == "32 x up to 256 tokens"
    old = from_dict(TextRecord, {"source": "a", "samples": 2, "seq_len": 8, "sha256": "0"})
    assert (old.size, old.tokens, old.prefix) == ("2 x 8 tokens", None, ())


def test_what_another_version_wrote_is_read_as_far_as_it_is_known():
    data = to_dict(RECORD) | {"of another version": 1}
    summary = from_dict(RunSummary, data)
    assert summary == RunSummary(RECORD.rates, "11", RECORD.calibration)
    assert from_dict(RunSummary, {"rates": data["rates"]}).calibration is None
    with pytest.raises(InputError, match="rates"):
        from_dict(RunSummary, {})
