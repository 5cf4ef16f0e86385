"""What text becomes for a model, as a user of the commands meets it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import srcr as library
from srcr.pipelines.options import Output, RunOptions
from srcr.plans.plan import Recipe
from srcr.plans.specs import QuantSpec
from srcr.storage.layout import RECORD

TEXT = "Once upon a time there was a little dog who liked to play in the park. "
QUIET = RunOptions(quiet=True)


def record_of(folder):
    return json.loads((folder / RECORD).read_text())


def weights_of(folder):
    return {p.name: load_file(p) for p in folder.glob("*.safetensors")}


def same_weights(left, right):
    ours, theirs = weights_of(left), weights_of(right)
    assert ours.keys() == theirs.keys()
    return all(
        torch.equal(tensor, theirs[file][name])
        for file, tensors in ours.items()
        for name, tensor in tensors.items()
    )


@pytest.fixture
def chats(tmp_path):
    """A file of short chats."""
    messages = [
        {"role": "user", "content": "tell me a story"},
        {"role": "assistant", "content": TEXT * 3},
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text((json.dumps({"messages": messages}) + "\n") * 30)
    return path


def test_padding_changes_nothing_that_is_written(srcr, tiny, tmp_path):
    """A padded file, on either side, against the rows themselves."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 96, (n,), generator=generator) for n in (30, 11, 30, 5, 18, 11)]
    recipe = Recipe(quant=QuantSpec(num_bits=3))
    plain = tmp_path / "plain"
    library.compress(str(tiny), Output(plain), recipe, [r.tolist() for r in rows], QUIET)
    for left in (True, False):
        ids, mask = torch.full((6, 32), 95), torch.zeros(6, 32, dtype=torch.int64)
        for number, row in enumerate(rows):
            place = slice(32 - len(row), None) if left else slice(len(row))
            ids[number, place], mask[number, place] = row, 1
        path, out = tmp_path / f"{left}.safetensors", tmp_path / f"out-{left}"
        save_file({"input_ids": ids, "attention_mask": mask}, path)
        result = srcr("compress", tiny, "-o", out, "--bits", 3, "--calibration", path)
        assert result.code == 0, result.err
        note = "87 tokens are padding by its attention_mask"
        assert note in " ".join(result.err.split())
        assert same_weights(plain, out)
        record = record_of(out)
        assert record["calibration"]["tokens"] == 105
        assert (record["calibration"]["samples"], record["calibration"]["seq_len"]) == (6, 30)
        assert record["calibration"]["sha256"] == record_of(plain)["calibration"]["sha256"]
        assert any(note in each for each in record["notes"])
        assert "6 x up to 30 tokens" in (out / "README.md").read_text()


def test_a_mask_with_holes_is_refused(srcr, tiny, tmp_path):
    ids = torch.randint(3, 96, (4, 8))
    mask = torch.ones_like(ids)
    mask[2, 3] = 0
    save_file({"input_ids": ids, "attention_mask": mask}, tmp_path / "ids.safetensors")
    result = srcr(
        "compress", tiny, "-o", tmp_path / "out", "--calibration", tmp_path / "ids.safetensors"
    )
    assert result.code == 2
    assert "attention_mask of row 2 has padding between tokens" in result.error()


def test_less_text_than_by_default_is_used_aloud(srcr, stories, tmp_path):
    path, out = tmp_path / "c.jsonl", tmp_path / "out"
    path.write_text((json.dumps({"text": TEXT * 20}) + "\n") * 4)
    command = ["compress", stories, "-o", out, "--calibration", path, "--seq-len", 64]
    result = srcr(*command)
    assert result.code == 0, result.err
    record = record_of(out)
    count = record["calibration"]["samples"]
    assert 2 < count < 128
    note = f"c.jsonl gives {count} sequences of 64 tokens, fewer than the 128 taken by default"
    assert note.replace(" ", "") in "".join(result.err.split())
    assert any(note in each for each in record["notes"])
    assert record["calibration"]["prefix"] == [1]
    assert record["calibration"]["tokens"] == 64 * count
    refused = srcr(*command, "--samples", 128, "--overwrite")
    assert refused.code == 2
    assert f"--samples {count}" in refused.error()
    assert record_of(out) == record


def test_a_search_with_a_number_that_the_text_does_not_give(srcr, stories, tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text((json.dumps({"text": TEXT * 20}) + "\n") * 8)
    command = ["plan", stories, "--target", "tcr=0.8", "-o", tmp_path / "plan.yaml",
               "--calibration", path, "--seq-len", 32]  # fmt: skip
    result = srcr(*command, "--samples", 64)
    assert result.code == 2
    assert "64 to calibrate on were asked for" in result.error()


def test_chats_go_through_the_template(srcr, stories, chats, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(stories, model)
    template = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    options = ["--calibration", chats, "--samples", 4, "--seq-len", 32, "--bits", 4]
    outs = tmp_path / "with", tmp_path / "without"
    results = [srcr("compress", m, "-o", out, *options)
               for m, out in zip((model, stories), outs, strict=True)]  # fmt: skip
    assert [result.code for result in results] == [0, 0]
    hashes = {record_of(out)["calibration"]["sha256"] for out in outs}
    assert len(hashes) == 2
    notes = [" ".join(record_of(out)["notes"]) for out in outs]
    assert ["no chat template" in note for note in notes] == [False, True]
    assert "no chat template" in " ".join(results[1].err.split())
    refusing = "{{ raise_exception('roles must alternate') }}"
    (model / "chat_template.jinja").write_text(refusing)
    refused = srcr("compress", model, "-o", tmp_path / "none", *options)
    assert refused.code == 2
    assert "chats.jsonl line 1" in refused.error()
    assert "roles must alternate" in refused.error()
