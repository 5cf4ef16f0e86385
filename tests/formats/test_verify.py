"""What was written is read back: a flipped bit is noticed, wherever it is."""

import json

import pytest
from safetensors.torch import load_file, save_file

from srcr.errors import SrcrError, VerificationError
from srcr.formats import get_format, verify
from srcr.formats.verify import logits_fit, verify_logits, verify_tensors
from srcr.models.checkpoint import open_model
from srcr.plans.plan import Recipe
from srcr.plans.specs import PruneSpec, QuantSpec
from srcr.testing import compressed_checkpoint, save_tiny_model

WEIGHTS = "model.safetensors"
FORMAT = get_format("compressed-tensors")


@pytest.fixture
def written(tmp_path):
    """(folder, open base, checkpoint) of a checkpoint that was just written."""
    opened = open_model(save_tiny_model(tmp_path / "base", "llama"))
    recipe = Recipe(PruneSpec("magnitude", 0.25), QuantSpec("rtn", 4, 16))
    checkpoint = compressed_checkpoint(opened, recipe)
    folder = tmp_path / "out"
    folder.mkdir()
    FORMAT.write(checkpoint, folder)
    return folder, opened, checkpoint


def run(written):
    folder, opened, checkpoint = written
    verify_tensors(FORMAT, checkpoint, folder)
    verify_logits(opened, FORMAT, folder)


def change(folder, name, at):
    """Flip the lowest bit of a byte of a tensor, where it stands in the file."""
    data = bytearray((folder / WEIGHTS).read_bytes())
    header = int.from_bytes(data[:8], "little")
    entry = json.loads(data[8 : 8 + header])[name]
    data[8 + header + entry["data_offsets"][0] + at] ^= 1
    (folder / WEIGHTS).write_bytes(data)


def test_what_was_written_passes(written):
    run(written)


@pytest.mark.parametrize("layer", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"])
@pytest.mark.parametrize("at", [0, 5, 30])
def test_a_flipped_bit_in_the_codes(written, layer, at):
    change(written[0], f"{layer}.weight_packed", at)
    with pytest.raises(VerificationError, match=layer.replace(".", r"\.")):
        run(written)


def test_a_flipped_bit_in_a_scale(written):
    change(written[0], "model.layers.1.mlp.down_proj.weight_scale", 4)
    with pytest.raises(VerificationError, match=r"layers\.1\.mlp\.down_proj"):
        run(written)


def test_a_changed_weight_that_was_not_compressed(written):
    folder, opened, _ = written
    tensors = load_file(folder / WEIGHTS)
    tensors["model.norm.weight"] *= 1.5
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"model\.norm\.weight"):
        run(written)
    verify_logits(opened, FORMAT, folder)  # what the folder stands for is what is loaded


def test_a_config_that_says_other_bits(written):
    path = written[0] / "config.json"
    path.write_text(path.read_text().replace('"num_bits": 4', '"num_bits": 8'))
    with pytest.raises(SrcrError):
        run(written)


def test_logits_are_compared_where_that_takes_no_more_memory_than_there_was(monkeypatch, tmp_path):
    opened = open_model(save_tiny_model(tmp_path / "base", "llama"))
    size = 2 * opened.weight_bytes
    monkeypatch.setattr(verify, "SMALL_MODEL", 0)
    for resident, fits in ((10**9 - size, True), (10**9 - size + 1, False)):
        monkeypatch.setattr(verify, "peak_memory", lambda: 10**9)
        monkeypatch.setattr(verify, "resident_memory", lambda _, value=resident: value)
        assert logits_fit(opened) == fits
    monkeypatch.setattr(verify, "SMALL_MODEL", size)
    assert logits_fit(opened)
