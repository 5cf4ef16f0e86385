"""What was written is read back: a flipped bit is noticed, wherever it is."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import srcr.pipelines.compress as compress_pipeline
from srcr.data.tokens import Tokens
from srcr.errors import SrcrError, VerificationError
from srcr.formats import get_format, verify
from srcr.formats.verify import Walked, logits_fit, verify_logits, verify_tensors
from srcr.models.checkpoint import open_model
from srcr.models.load import load_model
from srcr.models.topology import hidden_states
from srcr.pipelines.compress import compress
from srcr.pipelines.options import RunOptions
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


@torch.no_grad()
def walk(opened, checkpoint):
    """A row, and what the blocks with the checkpoint's weights give for it."""
    seen, model = [], checkpoint.dequantized()
    block = model.get_submodule(opened.topology.blocks[-1].name)
    block.register_forward_hook(lambda _, __, output: seen.append(hidden_states(output)))
    ids = torch.arange(12)[None]
    model(ids, use_cache=False)
    return Walked(ids, seen[0])


def run(written):
    folder, opened, checkpoint = written
    verify_tensors(FORMAT, checkpoint, folder)
    for streamed in (False, True):
        back = FORMAT.read(folder)
        verify_logits(opened, FORMAT, folder, back, walk(opened, checkpoint), streamed)


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
    folder, opened, checkpoint = written
    tensors = load_file(folder / WEIGHTS)
    tensors["model.norm.weight"] *= 1.5
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"model\.norm\.weight"):
        run(written)
    back = FORMAT.read(folder)
    for streamed in (False, True):
        with pytest.raises(VerificationError, match="other logits than the model that was"):
            verify_logits(opened, FORMAT, folder, back, walk(opened, checkpoint), streamed)


def test_a_config_that_says_other_bits(written):
    path = written[0] / "config.json"
    path.write_text(path.read_text().replace('"num_bits": 4', '"num_bits": 8'))
    with pytest.raises(SrcrError):
        run(written)


def test_logits_are_compared_where_that_takes_no_more_memory_than_there_was(monkeypatch, tmp_path):
    opened = open_model(save_tiny_model(tmp_path / "base", "llama"))
    size = 2 * opened.weight_bytes
    running = torch.float32
    monkeypatch.setattr(verify, "SMALL_MODEL", 0)
    for resident, fits in ((10**9 - size, True), (10**9 - size + 1, False)):
        monkeypatch.setattr(verify, "peak_memory", lambda: 10**9)
        monkeypatch.setattr(verify, "resident_memory", lambda _, value=resident: value)
        assert logits_fit(opened, running) == fits
    monkeypatch.setattr(verify, "SMALL_MODEL", size)
    assert logits_fit(opened, running)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", ["folder", "memory"])
@pytest.mark.parametrize("whole", [True, False])
def test_the_record_says_how_far_the_reloaded_logits_are(
    tmp_path, monkeypatch, dtype, given, whole
):
    monkeypatch.setattr(compress_pipeline, "logits_fit", lambda *_: whole)
    folder = save_tiny_model(tmp_path / "base", "gemma3", dtype)
    model = folder if given == "folder" else load_model(folder)
    ids = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(0))
    recipe = Recipe(PruneSpec("magnitude", 0.25), QuantSpec("rtn", 4, 16))
    record = compress(model, tmp_path / "out", recipe, Tokens.of(ids), RunOptions(quiet=True))
    check = record.verification
    assert check.tokens == 16
    assert check.difference <= check.tolerance / 4
    assert check.loaded_by == ("transformers" if whole else "srcr, block by block")
    assert (check.tolerance < 1e-2) == (dtype == torch.float32)


@pytest.mark.parametrize("whole", [True, False])
def test_a_walk_that_was_not_the_models_own_is_noticed(tmp_path, monkeypatch, whole):
    """What is calibrated on wrong activations reads back bit for bit, and is wrong all the same."""
    monkeypatch.setattr(compress_pipeline, "logits_fit", lambda *_: whole)
    opened = open_model(save_tiny_model(tmp_path / "base", "llama"))
    embed = opened.blockwise.embed

    def scaled(batches):
        for hidden, arguments in embed(batches):
            yield hidden * 1.5, arguments

    monkeypatch.setattr(opened.blockwise, "embed", scaled)
    ids = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(0))
    recipe = Recipe(PruneSpec("magnitude", 0.25), QuantSpec("rtn", 4, 16))
    with pytest.raises(VerificationError, match="other logits"):
        compress(opened, tmp_path / "out", recipe, Tokens.of(ids), RunOptions(quiet=True))
    assert not (tmp_path / "out").exists()
