"""The archive: every setting comes back to the bit, at the entropy's size; damage is named."""

import io
import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import srcr
from srcr.errors import InputError
from srcr.formats import detect, get_format
from srcr.storage.layout import ARCHIVE
from srcr.testing.checkpoints import compressed_checkpoint
from srcr.testing.families import tiny_model

pytest.importorskip("constriction")
pytest.importorskip("zstandard")

from srcr.formats.archive.container import (
    END,
    MAGIC,
    ArchiveFile,
    ArchiveWriter,
    Record,
    stream_records,
)

FORMAT = get_format("archive")
QUIET = srcr.RunOptions(0, quiet=True)


def written(model, recipe, folder):
    checkpoint = compressed_checkpoint(model, recipe)
    folder.mkdir()
    FORMAT.write(checkpoint, folder)
    return checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(2, -1), (3, 16), (4, 8), (5, -1), (8, 32)])
def test_codes_scales_and_zero_points_come_back(tmp_path, dtype, symmetric, bits, group):
    recipe = srcr.Recipe(
        srcr.PruneSpec("magnitude", 0.3),
        srcr.QuantSpec("rtn", bits, group, symmetric),
        ignore=["*.down_proj"],
        embeddings=srcr.QuantSpec("rtn", 8, -1),
    )
    checkpoint = written(tiny_model("llama", dtype), recipe, tmp_path / "a")
    read = FORMAT.read(tmp_path / "a")
    assert read.contents.schemes.keys() == checkpoint.contents.schemes.keys()
    for name, scheme in checkpoint.contents.schemes.items():
        ours, theirs = read.read(name), checkpoint.read(name)
        assert torch.equal(ours.codes, theirs.codes)
        assert torch.equal(ours.grid.scale, theirs.grid.scale)
        assert ours.grid.dtype == theirs.grid.dtype
        assert (ours.grid.zero_point is None) == scheme.symmetric
        if not scheme.symmetric:
            assert torch.equal(ours.grid.zero_point, theirs.grid.zero_point)
    for name in checkpoint.plain_names():
        assert torch.equal(read.tensor(name), checkpoint.tensor(name))


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma3", "phi3"])
def test_other_families(tmp_path, family):
    recipe = srcr.Recipe(srcr.PruneSpec.of("magnitude", 0, "2:4"), srcr.QuantSpec("rtn", 4, -1))
    checkpoint = written(tiny_model(family), recipe, tmp_path / "a")
    ids = torch.arange(12)[None]
    expected = checkpoint.dequantized()(ids).logits
    assert torch.equal(srcr.load(tmp_path / "a")(ids).logits, expected)


def test_scales_of_another_precision_than_the_product(tmp_path):
    recipe = srcr.Recipe(None, srcr.QuantSpec("rtn", 4, -1, scale_dtype="float16"))
    checkpoint = written(tiny_model("llama", torch.bfloat16), recipe, tmp_path / "a")
    name = checkpoint.contents.compressed[0]
    grid = FORMAT.read(tmp_path / "a").read(name).grid
    assert (grid.dtype, grid.product_dtype) == (torch.float16, torch.float32)


@pytest.mark.slow
class TestARealModel:
    """stories260K at 25 % + 4 bits and at 4 bits."""

    @pytest.fixture(scope="class", params=[0.25, 0.0])
    def folder(self, request, stories, tmp_path_factory):
        out = tmp_path_factory.mktemp("archive") / "packed"
        prune = srcr.PruneSpec(sparsity=request.param) if request.param else None
        recipe = srcr.Recipe(prune, srcr.QuantSpec(num_bits=4, group_size=-1))
        srcr.compress(stories, out, recipe, srcr.Calibration("self", 8, 128), QUIET)
        return out

    def test_it_is_packed_and_unpacked_to_the_bit(self, folder, tmp_path):
        record = srcr.export(folder, srcr.Output(tmp_path / "a", format="archive"), QUIET)
        assert record.rates.stored_bytes == (tmp_path / "a" / ARCHIVE).stat().st_size
        assert detect(tmp_path / "a").name == "archive"
        srcr.export(tmp_path / "a", srcr.Output(tmp_path / "b", format="compressed-tensors"), QUIET)
        assert (tmp_path / "b/model.safetensors").read_bytes() == (
            folder / "model.safetensors"
        ).read_bytes()
        assert record.rates.stored_bytes < (folder / "model.safetensors").stat().st_size

    def test_codes_take_their_entropy(self, folder, tmp_path):
        """Within 2 % of the entropy of the codes and the bytes of the scales."""
        record = srcr.export(folder, srcr.Output(tmp_path / "a", format="archive"), QUIET)
        archive, coded, ideal = ArchiveFile(tmp_path / "a" / ARCHIVE), 0, 0.0
        for layer in record.layers:
            parts = archive.read(layer.name).parts()
            coded += len(parts["codes"]) + len(parts["scale"])
            rows, cols = layer.shape
            ideal += layer.entropy_bits * rows * cols / 8 + 4 * rows
        assert coded < 1.02 * ideal

    def test_it_is_evaluated_like_any_other(self, folder, stories, tmp_path):
        srcr.export(folder, srcr.Output(tmp_path / "a", format="archive"), QUIET)
        text = srcr.EvaluationText("self", 2, 64)
        results = srcr.evaluate(stories, [folder, tmp_path / "a"], text, options=QUIET)
        assert results[0].divergence == results[1].divergence
        assert results[1].rates.engine == "srcr"


def small_archive(path):
    records = [
        Record("one", {"kind": "plain", "shape": [2, 3], "parts": {"a": 3, "b": 2}}, b"abcde"),
        Record("two", {"kind": "plain"}, bytes(range(40))),
        Record("", {}, b""),
    ]
    with ArchiveWriter(path) as archive:
        for record in records:
            archive.write(record)
    return records


def read_all(path):
    archive = ArchiveFile(path)
    return [archive.read(name) for name in archive.names()]


class TestContainer:
    def test_records_come_back_at_random_and_as_a_stream(self, tmp_path):
        path = tmp_path / "a"
        records = small_archive(path)
        assert read_all(path) == records
        assert list(stream_records(io.BytesIO(path.read_bytes()), path)) == records
        archive = ArchiveFile(path)
        assert "one" in archive
        assert "three" not in archive
        assert archive.header("one").header == records[0].header
        assert archive.read("one").parts() == {"a": b"abc", "b": b"de"}
        assert archive.read("one").shape() == (2, 3)

    @given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
    def test_a_flipped_bit_anywhere_is_detected(self, tmp_path_factory, place, bit):
        path = tmp_path_factory.mktemp("flip") / "a"
        small_archive(path)
        data = bytearray(path.read_bytes())
        data[int(place * len(data))] ^= 1 << bit
        path.write_bytes(data)
        with pytest.raises(InputError, match=str(path)):
            read_all(path)

    def test_a_flipped_bit_is_named(self, tmp_path):
        path = tmp_path / "a"
        small_archive(path)
        data = path.read_bytes().replace(b"abcde", b"abcdd")
        path.write_bytes(data)
        with pytest.raises(InputError, match="the checksum of one is another"):
            read_all(path)
        with pytest.raises(InputError, match="the checksum of a record is another"):
            list(stream_records(io.BytesIO(data), path))

    @given(length=st.integers(0, 10_000))
    def test_a_file_that_is_cut_off_is_refused(self, tmp_path_factory, length):
        path = tmp_path_factory.mktemp("cut") / "a"
        small_archive(path)
        data = path.read_bytes()
        path.write_bytes(data[: min(length, len(data) - 1)])
        with pytest.raises(InputError, match=r"is cut off|is no srcr archive"):
            read_all(path)
        with pytest.raises(InputError):
            list(stream_records(io.BytesIO(path.read_bytes()[:-30]), path))

    @given(data=st.binary(max_size=200))
    def test_anything_else_is_refused(self, tmp_path_factory, data):
        path = tmp_path_factory.mktemp("any") / "a"
        for start in (b"", MAGIC + struct.pack("<H", 1)):
            for end in (b"", struct.pack("<Q", 8) + END):
                path.write_bytes(start + data + end)
                with pytest.raises(InputError):
                    read_all(path)

    def test_a_later_version_is_named(self, tmp_path):
        path = tmp_path / "a"
        small_archive(path)
        path.write_bytes(MAGIC + struct.pack("<H", 2) + path.read_bytes()[8:])
        with pytest.raises(InputError, match="an archive of version 2, and this srcr reads 1"):
            ArchiveFile(path)

    def test_lengths_are_not_believed(self, tmp_path):
        path = tmp_path / "a"
        huge = struct.pack("<IQ", 1 << 19, 1 << 62) + b"{}"
        path.write_bytes(MAGIC + struct.pack("<H", 1) + huge + struct.pack("<Q8s", 8, END))
        with pytest.raises(InputError, match="announces more bytes than there are"):
            ArchiveFile(path)

    @pytest.mark.parametrize(
        ("header", "message"),
        [
            ({}, "has no shape"),
            ({"shape": [-1]}, "has no shape"),
            ({"shape": [1 << 30, 1 << 30]}, "has the shape"),
            ({"shape": "x"}, "has no shape"),
        ],
    )
    def test_shapes_are_checked(self, header, message):
        with pytest.raises(InputError, match=message):
            Record("a", header, b"").shape()

    @pytest.mark.parametrize("parts", [None, {"a": -1}, {"a": 3}, {"a": 1}, []])
    def test_parts_are_checked(self, parts):
        with pytest.raises(InputError, match="parts"):
            Record("a", {"parts": parts}, b"xy").parts()


def test_codes_that_do_not_fit_the_model_are_refused(tmp_path):
    recipe = srcr.Recipe(None, srcr.QuantSpec("rtn", 4, -1))
    checkpoint = written(tiny_model("llama"), recipe, tmp_path / "a")
    path, name = tmp_path / "a" / ARCHIVE, checkpoint.contents.compressed[0]
    archive = ArchiveFile(path)
    for changes in ({"bits": 9}, {"shape": [1, 2]}, {"group_size": 5}, {"scale_dtype": "int3"}):
        other = tmp_path / "a" / "other"
        with ArchiveWriter(other) as writer:
            for each in archive.names():
                record = archive.read(each)
                header = {**record.header, **(changes if each == name else {})}
                writer.write(Record(each, header, record.payload))
        original = path.read_bytes()
        other.replace(path)
        with pytest.raises(InputError, match=r"does not fit the model|is damaged"):
            FORMAT.read(tmp_path / "a").read(name)
        path.write_bytes(original)
        archive = ArchiveFile(path)


def test_names_that_lead_elsewhere_are_names_only(tmp_path):
    """Records are tensors, not files: nothing is written by what they are called."""
    path = tmp_path / "a"
    with ArchiveWriter(path) as writer:
        writer.write(Record("../../x", {"kind": "plain"}, b"1"))
    assert [record.name for record in read_all(path)] == ["../../x"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_the_index_is_json_that_people_can_read(tmp_path):
    path = tmp_path / "a"
    small_archive(path)
    data = path.read_bytes()
    at, end = struct.unpack("<Q8s", data[-16:])
    header, payload = struct.unpack_from("<IQ", data, at)
    index = json.loads(data[at + 12 + header :][:payload])
    assert end == END
    assert list(index) == ["one", "two", ""]
    assert index["one"] == 8
