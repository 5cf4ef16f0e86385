"""Folders appear whole or not at all, and nothing is lost."""

import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from srcr.compression import Calibration, Output, Recipe, compress
from srcr.errors import InputError, SrcrError, VerificationError
from srcr.files import RECORD
from srcr.formats import checkpoint, compressed_tensors, get_format
from srcr.formats.checkpoint import (
    check_output,
    partial_path,
    verify_block,
    verify_logits,
    whole_or_nothing,
    write_config,
)
from srcr.formats.journal import MARK
from srcr.formats.safetensors_files import TensorFiles, save_tensors, stream_tensors
from srcr.methods.joint import compress_unit
from srcr.models.load import INDEX, load_model
from srcr.models.topology import observe
from srcr.models.weights import ModelWeights
from srcr.testing import save_tiny_model, write_weights
from srcr.types import CompressionPlan, LayerPlan, LayerStats, PruneSpec, QuantSpec, SweepSpec

WEIGHTS = "model.safetensors"


class TestCheckOutput:
    @pytest.fixture
    def model(self, tmp_path):
        (tmp_path / "models/base").mkdir(parents=True)
        return tmp_path / "models/base"

    def test_a_new_name_is_fine(self, model, tmp_path):
        check_output(tmp_path / "out", model, overwrite=False)

    @pytest.mark.parametrize("name", ["out", "out.partial"])
    def test_what_exists_is_refused(self, model, tmp_path, name):
        (tmp_path / name).mkdir()
        with pytest.raises(InputError, match=rf"{name} exists: .*--overwrite"):
            check_output(tmp_path / "out", model, overwrite=False)
        check_output(tmp_path / "out", model, overwrite=True)

    def test_an_earlier_result_may_be_overwritten(self, model, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / RECORD).write_text("{}")
        check_output(tmp_path / "out", model, overwrite=True)

    def test_somebody_elses_folder_is_never_replaced(self, model, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/thesis.txt").write_text("years of work")
        with pytest.raises(InputError, match=r"did not write.*even with --overwrite"):
            check_output(tmp_path / "out", model, overwrite=True)

    @pytest.mark.parametrize("name", ["out", "out.partial"])
    def test_files_and_links_are_never_replaced(self, model, tmp_path, name):
        (tmp_path / name).write_text("a file")
        with pytest.raises(InputError, match="is not a folder"):
            check_output(tmp_path / "out", model, overwrite=True)
        (tmp_path / name).unlink()
        (tmp_path / name).symlink_to(model)
        with pytest.raises(InputError):
            check_output(tmp_path / "out", model, overwrite=True)
        (tmp_path / name).unlink()
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
        with pytest.raises(InputError):
            check_output(tmp_path / "out", model, overwrite=False)

    @pytest.mark.parametrize("path", ["models/base", "models", "models/../models/base"])
    def test_the_model_itself_is_never_replaced(self, model, tmp_path, path):
        with pytest.raises(InputError, match="is or holds the model itself"):
            check_output(tmp_path / path, model, overwrite=True)

    def test_the_model_behind_a_link_is_never_replaced(self, model, tmp_path):
        (tmp_path / "link").symlink_to(model)
        with pytest.raises(InputError, match="is or holds the model itself"):
            check_output(model, tmp_path / "link", overwrite=True)

    def test_missing_parents_are_made_but_a_file_in_their_place_is_refused(self, model, tmp_path):
        check_output(tmp_path / "new/deep/out", model, overwrite=False)
        assert not (tmp_path / "new").exists()
        with whole_or_nothing(tmp_path / "new/deep/out", model, overwrite=False):
            pass
        assert (tmp_path / "new/deep/out").is_dir()
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="is a file, not a folder"):
            check_output(tmp_path / "file/out", model, overwrite=False)


class TestWholeOrNothing:
    def write(self, out, overwrite=True):
        return whole_or_nothing(out, out.parent / "no-model", overwrite)

    def earlier(self, out):
        out.mkdir()
        (out / RECORD).write_text("old")

    def fail_with(self, error, out):
        with self.write(out) as journal:
            (journal.folder / "a").write_text("half")
            raise error

    def test_success_renames(self, tmp_path):
        with self.write(tmp_path / "out") as journal:
            assert journal.folder == partial_path(tmp_path / "out")
            (journal.folder / "a").write_text("new")
            assert not (tmp_path / "out").exists()
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_an_earlier_result_is_replaced_only_at_the_end(self, tmp_path):
        self.earlier(tmp_path / "out")
        with self.write(tmp_path / "out"):
            assert (tmp_path / "out" / RECORD).exists()
        assert not (tmp_path / "out" / RECORD).exists()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_what_appears_during_a_long_run_is_not_replaced_unasked(self, tmp_path):
        with pytest.raises(InputError, match="exists"), self.write(tmp_path / "out", False):
            self.earlier(tmp_path / "out")
        assert (tmp_path / "out" / RECORD).read_text() == "old"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_a_result_that_was_put_aside_is_never_lost(self, tmp_path):
        self.earlier(tmp_path / "out.replaced")
        with (
            pytest.raises(InputError, match="Move it back or remove it"),
            self.write(tmp_path / "out"),
        ):
            pass
        assert (tmp_path / "out.replaced" / RECORD).exists()

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, InputError])
    def test_failure_leaves_nothing_and_keeps_the_earlier_result(self, tmp_path, error):
        self.earlier(tmp_path / "out")
        with pytest.raises(error):
            self.fail_with(error("stop"), tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert (tmp_path / "out" / RECORD).read_text() == "old"

    def test_a_disk_that_refuses_is_named(self, tmp_path):
        with pytest.raises(SrcrError, match=r"writing .*out failed: .*No space left"):
            self.fail_with(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), tmp_path / "new/out")
        assert not list(tmp_path.iterdir())

    def test_a_leftover_does_not_leak_into_the_result(self, tmp_path):
        (tmp_path / "out.partial").mkdir()
        (tmp_path / "out.partial" / MARK).touch()
        (tmp_path / "out.partial/junk").write_text("old")
        with self.write(tmp_path / "out"):
            pass
        assert not list((tmp_path / "out").iterdir())

    def test_a_model_in_the_place_of_the_work_in_progress_is_never_removed(self, tmp_path):
        (tmp_path / "out.partial").mkdir()
        (tmp_path / "out.partial/config.json").write_text("{}")
        model = tmp_path / "out.partial"
        with pytest.raises(InputError, match="holds the model itself"):
            check_output(tmp_path / "out", model, overwrite=True)
        with pytest.raises(InputError, match="did not write"):
            check_output(tmp_path / "out", tmp_path / "elsewhere", overwrite=True)


def test_tensors_are_streamed_to_the_bytes_that_the_library_writes(tmp_path):
    """Every precision, names that sort otherwise, no dimensions, no numbers, a transposed view."""
    generator = torch.Generator().manual_seed(0)
    kinds = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
             torch.float16, torch.bfloat16, torch.float32, torch.float64]  # fmt: skip
    tensors = {
        f"{name}.{kind}": torch.randint(0, 2, shape, generator=generator).to(kind)
        for kind in kinds
        for name, shape in {"b": (3, 5), "a": (7,), "é": (), "B": (0, 4)}.items()
    }
    tensors["view"] = torch.randn(4, 6, generator=generator).T
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_tensors(plain, tmp_path / "whole")
    shapes = {name: tensor.to("meta") for name, tensor in plain.items()}
    stream_tensors(shapes, tensors.__getitem__, tmp_path / "streamed")
    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "whole").read_bytes()


class TestTensorFiles:
    def index(self, folder, names):
        (folder / INDEX).write_text(json.dumps({"weight_map": names}))

    @pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/a.safetensors"])
    def test_an_index_may_not_point_outside(self, tmp_path, name):
        folder = tmp_path / "model"
        (folder / "sub").mkdir(parents=True)
        for path in (tmp_path / "secret.safetensors", folder / "sub/a.safetensors"):
            save_file({"a": torch.zeros(1)}, path)
        self.index(folder, {"a": name})
        with pytest.raises(InputError, match="outside its folder"):
            TensorFiles(folder)

    def test_a_shard_that_is_missing(self, tmp_path):
        self.index(tmp_path, {"a": "model-1.safetensors"})
        with pytest.raises(InputError, match=r"names 'model-1\.safetensors', which is missing"):
            TensorFiles(tmp_path)

    @pytest.mark.parametrize(
        "text", ["{", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}']
    )
    def test_a_broken_index(self, tmp_path, text):
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(InputError, match="not a valid index"):
            TensorFiles(tmp_path)

    def test_no_weights_at_all(self, tmp_path):
        with pytest.raises(InputError, match=r"no \*\.safetensors weights"):
            TensorFiles(tmp_path)

    def test_a_damaged_file(self, tmp_path):
        (tmp_path / WEIGHTS).write_bytes(b"12345678901234567890")
        with pytest.raises(InputError, match="not a valid safetensors file"):
            TensorFiles(tmp_path)

    def test_tensors_of_several_files(self, tmp_path):
        save_file({"a": torch.ones(3)}, tmp_path / "one.safetensors")
        save_file({"b": torch.ones(2, 2).half()}, tmp_path / "two.safetensors")
        self.index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
        with TensorFiles(tmp_path) as files:
            assert sorted(files.names()) == ["a", "b"]
            assert files.sizes() == {"a": 12, "b": 8}
            assert torch.equal(files.get("a"), torch.ones(3))
            assert "c" not in files
            with pytest.raises(InputError, match="no tensor 'c'"):
                files.get("c")


class TestVerify:
    @pytest.fixture
    def written(self, tmp_path):
        """(folder, base, topology, compressed) of a checkpoint that was just written."""
        base = save_tiny_model(tmp_path / "base", "llama")
        model = load_model(base)
        topology = observe(model)
        plan = CompressionPlan(
            tuple(
                LayerPlan(name, PruneSpec("magnitude", 0.25), QuantSpec("rtn", 4, 16))
                for name in topology.linears()
            )
        )
        compressed = {}
        for layer in plan.layers:
            weight = model.get_submodule(layer.name).weight
            stats = LayerStats(torch.eye(weight.shape[1]), weight.shape[1])
            compressed |= compress_unit(
                {layer.name: weight}, stats, {layer.name: layer}, SweepSpec(), torch.float32
            )
        folder = tmp_path / "out"
        folder.mkdir()
        write_weights(folder, model, compressed, compressed_tensors)
        write_config(folder, base, plan, topology, compressed_tensors)
        return folder, base, topology, compressed

    def run(self, written):
        folder, base, topology, compressed = written
        fmt = compressed_tensors
        verify_block(folder, folder / WEIGHTS, compressed, topology, fmt, torch.float32)
        verify_logits(folder, ModelWeights(load_model(base)), fmt)

    def change(self, folder, name, at):
        """Flip the lowest bit of one byte of a tensor, where it stands in the file."""
        data = bytearray((folder / WEIGHTS).read_bytes())
        header = int.from_bytes(data[:8], "little")
        entry = json.loads(data[8 : 8 + header])[name]
        data[8 + header + entry["data_offsets"][0] + at] ^= 1
        (folder / WEIGHTS).write_bytes(data)

    def test_what_was_written_passes(self, written):
        self.run(written)

    @pytest.mark.parametrize(
        "layer", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    )
    @pytest.mark.parametrize("at", [0, 5, 30])
    def test_one_flipped_bit_in_the_codes(self, written, layer, at):
        self.change(written[0], f"{layer}.weight_packed", at)
        with pytest.raises(VerificationError, match=layer.replace(".", r"\.")):
            self.run(written)

    def test_one_flipped_bit_in_a_scale(self, written):
        self.change(written[0], "model.layers.1.mlp.down_proj.weight_scale", 4)
        with pytest.raises(VerificationError, match=r"layers\.1\.mlp\.down_proj"):
            self.run(written)

    def test_a_changed_weight_that_was_not_compressed(self, written):
        folder = written[0]
        tensors = load_file(folder / WEIGHTS)
        tensors["model.norm.weight"] *= 1.5
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(VerificationError, match="other logits"):
            self.run(written)

    def test_a_config_that_says_other_bits(self, written):
        path = written[0] / "config.json"
        path.write_text(path.read_text().replace('"num_bits": 4', '"num_bits": 8'))
        with pytest.raises(SrcrError):
            self.run(written)


def test_logits_are_compared_where_that_takes_no_more_memory_than_there_was(monkeypatch, tmp_path):
    (tmp_path / WEIGHTS).write_bytes(bytes(1000))
    monkeypatch.setattr(checkpoint.memory, "peak", lambda: 5000)
    for resident, little, fits in ((3000, 0, True), (3001, 0, False), (5000, 2000, True)):
        monkeypatch.setattr(checkpoint.memory, "resident", lambda _, size=resident: size)
        monkeypatch.setattr(checkpoint, "LITTLE", little)
        assert checkpoint.logits_fit(tmp_path) == fits


def test_unknown_and_later_formats():
    with pytest.raises(InputError, match=r"'onnx' is not known: use compressed-tensors, dense"):
        get_format("onnx")
    with pytest.raises(InputError, match="--format gguf is not available yet"):
        get_format("gguf")


class TestGpt2:
    def run(self, tmp_path, format_name):
        base = save_tiny_model(tmp_path / "base", "gpt2")
        save_file({"input_ids": torch.randint(0, 96, (2, 16))}, tmp_path / "ids.safetensors")
        return compress(
            base,
            Recipe(None, QuantSpec()),
            Calibration(str(tmp_path / "ids.safetensors")),
            Output(tmp_path / "out", format_name),
            quiet=True,
        )

    def test_compressed_tensors_is_refused_when_asked_for(self, tmp_path):
        with pytest.raises(InputError, match=r"Conv1D.*--format dense"):
            self.run(tmp_path, "compressed-tensors")
        assert {path.name for path in tmp_path.iterdir()} == {"base", "ids.safetensors"}

    def test_by_default_it_becomes_dense_and_says_so(self, tmp_path):
        record = self.run(tmp_path, None)
        assert record.format == "dense"
        assert any("dense" in note and "Conv1D" in note for note in record.notes)
        assert "quantization_config" not in (tmp_path / "out/config.json").read_text()
        model = load_model(tmp_path / "out")
        for name in observe(model).linears():
            weight = model.get_submodule(name).weight.T
            assert max(len(row.unique()) for row in weight) <= 16
