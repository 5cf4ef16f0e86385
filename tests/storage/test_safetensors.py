"""Tensors in files: read by name, written a tensor at a time, hashed and inspected on the way."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file

from srcr.errors import InputError
from srcr.storage.index import INDEX, SINGLE
from srcr.storage.safetensors import (
    TensorFiles,
    TensorFileWriter,
    hash_and_inspect,
    hash_files,
    read_header,
    save_tensors,
)


def tensors_of_every_kind():
    """Every precision, names that sort otherwise, no dimensions, no numbers, a transposed view, a single
    number with a stride."""
    generator = torch.Generator().manual_seed(0)
    kinds = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
             torch.float16, torch.bfloat16, torch.float32, torch.float64]  # fmt: skip
    tensors = {
        f"{name}.{kind}": torch.randint(0, 2, shape, generator=generator).to(kind)
        for kind in kinds
        for name, shape in {"b": (3, 5), "a": (7,), "é": (), "B": (0, 4)}.items()
    }
    tensors["view"] = torch.randn(4, 6, generator=generator).T
    tensors["strided"] = torch.randn(4, 6, generator=generator)[::4, ::6]
    return tensors


def test_a_writer_makes_the_bytes_that_the_library_makes(tmp_path):
    tensors = tensors_of_every_kind()
    save_tensors({n: t.contiguous().clone() for n, t in tensors.items()}, tmp_path / "whole")
    layout = {name: tensor.to("meta") for name, tensor in tensors.items()}
    with TensorFileWriter(tmp_path / "streamed", layout) as writer:
        for name in reversed(layout):  # in any order
            writer.write(name, tensors[name])
    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_tensor_that_is_not_written_is_a_fault(tmp_path):
    layout = {"a": torch.empty(2, device="meta"), "b": torch.empty(2, device="meta")}
    with (
        pytest.raises(AssertionError, match="not written: b"),
        TensorFileWriter(tmp_path / "x", layout) as writer,
    ):
        writer.write("a", torch.zeros(2))


def test_files_are_hashed_and_inspected_in_a_single_pass(tmp_path, monkeypatch):
    monkeypatch.setattr("srcr.storage.safetensors.CHUNK_BYTES", 64)
    tensors = {n: t.contiguous().clone() for n, t in tensors_of_every_kind().items()}
    save_tensors(tensors, tmp_path / "a.safetensors")
    save_tensors({"more": torch.arange(50.0)}, tmp_path / "b.safetensors")
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    seen = {}
    digest = hash_and_inspect(
        paths, lambda name, part: seen.setdefault(name, []).append(part.clone())
    )
    content = b"".join(path.read_bytes() for path in paths)
    assert digest == hash_files(paths) == hashlib.sha256(content).hexdigest()
    for name, tensor in (tensors | {"more": torch.arange(50.0)}).items():
        if tensor.numel():
            assert torch.equal(torch.cat(seen[name]), tensor.reshape(-1)), name


def test_a_file_that_ends_too_soon(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"a\.safetensors"):
        hash_and_inspect([path], lambda *_: None)


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
        (tmp_path / SINGLE).write_bytes(b"12345678901234567890")
        with pytest.raises(InputError, match="not a valid safetensors file"):
            TensorFiles(tmp_path)

    def test_tensors_of_several_files(self, tmp_path):
        save_file({"a": torch.ones(3)}, tmp_path / "first.safetensors")
        save_file({"b": torch.ones(2, 2).half()}, tmp_path / "second.safetensors")
        self.index(tmp_path, {"a": "first.safetensors", "b": "second.safetensors"})
        files = TensorFiles(tmp_path)
        assert sorted(files.entries) == ["a", "b"]
        assert files.sizes() == {"a": 12, "b": 8}
        assert torch.equal(files.get("a"), torch.ones(3))
        assert (files.meta("b").shape, files.meta("b").dtype) == ((2, 2), torch.float16)
        assert "c" not in files
        with pytest.raises(InputError, match="no tensor 'c'"):
            files.get("c")

    def test_shapes_are_read_without_the_data(self, tmp_path):
        save_file({"a": torch.ones(3, 4)}, tmp_path / SINGLE)
        data = bytearray((tmp_path / SINGLE).read_bytes())
        data[-48:] = bytes(range(48))
        (tmp_path / SINGLE).write_bytes(data)
        assert TensorFiles(tmp_path).meta("a").shape == (3, 4)


def test_a_git_lfs_pointer_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1044992\n"
    )
    with pytest.raises(InputError, match=r"Git LFS pointer.*git lfs pull"):
        read_header(path)
