"""``archive``: one file as small as theory allows, from which every format that holds its grids is made.

Codes, scales and everything else are entropy-coded (docs/archive.md). No engine runs it: it is what is kept
and sent; ``srcr export`` unpacks it.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from srcr.errors import InputError
from srcr.formats import Format
from srcr.formats.archive.container import ArchiveFile, ArchiveWriter, Record
from srcr.formats.checkpoint import Checkpoint, Contents, Scheme, dequantizing
from srcr.formats.shards import write_config
from srcr.models.checkpoint import OpenModel
from srcr.models.config import check_causal, config_of
from srcr.models.matrices import MatrixRef
from srcr.models.source import plain_config
from srcr.numerics.coding import decode_symbols, encode_symbols
from srcr.numerics.compressed import CompressedWeight
from srcr.numerics.float_coding import decode_floats, encode_floats
from srcr.numerics.grid import Grid, code_range
from srcr.numerics.super_blocks import SUPER_BLOCK
from srcr.numerics.tensors import dtype_name
from srcr.records.run import LoadedBytes
from srcr.storage.index import containers
from srcr.storage.layout import ARCHIVE

#: What is added to multiples of super-blocks' scales, so that none is negative.
MIDDLE = 128
#: Kinds of records.
CODES, PLAIN = "codes", "plain"
#: Precisions by their names in records.
DTYPES = {
    dtype_name(dtype): dtype
    for dtype in (
        torch.float32, torch.float16, torch.bfloat16, torch.float64,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip


def _check(_: Contents) -> None:
    """Everything fits."""
    _check_installed()


def _check_installed() -> None:
    """Refuse to go on without the coder.

    Raises:
        InputError: it is not installed.
    """
    try:
        import constriction  # noqa: F401
        import zstandard  # noqa: F401
    except ImportError:
        raise InputError(
            "--format archive needs the packages constriction and zstandard: pip install 'srcr[archive]'"
        ) from None


def _layout(
    ref: MatrixRef, shape: tuple[int, int], scheme: Scheme | None, dtype: torch.dtype
) -> Mapping[str, Tensor]:
    """At most so many bytes: codes packed without gaps, and scales; what coding saves is not known before."""
    rows, cols = shape
    if scheme is None:
        return {ref.parameter: torch.empty(rows, cols, dtype=dtype, device="meta")}
    groups = 1 if scheme.group_size == -1 else cols // scheme.group_size
    packed = math.ceil(cols * scheme.num_bits / 8)
    tensors = {
        f"{ref.parameter}:codes": torch.empty(rows, packed, dtype=torch.uint8, device="meta"),
        f"{ref.parameter}:scale": torch.empty(rows, groups, dtype=dtype, device="meta"),
    }
    if not scheme.symmetric:
        zeros = torch.empty(rows, groups, dtype=torch.int8, device="meta")
        tensors[f"{ref.parameter}:zero_point"] = zeros
    return tensors


def _write(checkpoint: Checkpoint, folder: Path) -> None:
    _check_installed()
    write_config(checkpoint, folder)
    schemes = checkpoint.contents.schemes
    # A parameter that is pruned only is stored as any other.
    coded = {name for name in checkpoint.contents.compressed if name in schemes}
    stored = {checkpoint.contents.topology.matrix(name).parameter for name in coded}
    others = [name for name in checkpoint.tensors.names() if name not in stored]
    with ArchiveWriter(folder / ARCHIVE) as archive:
        for name in sorted(others):
            archive.write(_plain_record(name, checkpoint.tensor(name)))
        for name in sorted(coded):
            archive.write(_codes_record(name, checkpoint.read(name), schemes[name]))


def _plain_record(name: str, tensor: Tensor) -> Record:
    payload = encode_floats(tensor)
    header = {"kind": PLAIN, "dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape)}
    return Record(name, {**header, "parts": {"values": len(payload)}}, payload)


def _codes_record(name: str, weight: CompressedWeight, scheme: Scheme) -> Record:
    codes, grid = weight.codes, weight.grid
    assert codes is not None
    assert grid is not None
    symbols = (codes.numpy().astype(np.int16) - code_range(grid.num_bits)[0]).astype(np.uint8)
    parts = {"codes": encode_symbols(symbols)}
    if grid.super_scale is None:
        parts["scale"] = encode_floats(grid.scale.to(grid.dtype))
    else:
        multiples = (grid.multiples() + MIDDLE).to(torch.uint8)
        parts["scale"] = encode_symbols(multiples.numpy())
        parts["super_scale"] = encode_floats(grid.super_scale.to(grid.dtype))
    if grid.zero_point is not None:
        zeros = (grid.zero_point - code_range(grid.num_bits)[0]).to(torch.uint8)
        parts["zero_point"] = encode_symbols(zeros.numpy())
    header = {
        "kind": CODES,
        "shape": list(weight.shape),
        "bits": grid.num_bits,
        "group_size": scheme.group_size,
        "scale_dtype": dtype_name(grid.dtype),
        "scale_bits": grid.scale_bits,
        "product_dtype": dtype_name(grid.product_dtype),
        "parts": {key: len(part) for key, part in parts.items()},
    }
    return Record(name, header, b"".join(parts.values()))


def _read(folder: Path) -> Checkpoint:
    """The checkpoint, codes and grids as they were written. Masks and errors are not stored."""
    _check_installed()
    archive = ArchiveFile(folder / ARCHIVE)
    source = ArchiveSource(folder, archive)
    opened = OpenModel(str(folder), source, folder)
    schemes = {
        name: _scheme(source.codes[name], opened.topology.shape(name))
        for name in [*opened.topology.linears(), *opened.topology.embeddings]
        if name in source.codes
    }
    contents = Contents(opened.topology, opened.config, schemes, tuple(schemes))
    return Checkpoint.of(opened, contents, partial(_decode, archive))


def _scheme(record: Record, shape: tuple[int, int]) -> Scheme:
    bits: Any = record.header.get("bits")
    size: Any = record.header.get("group_size")
    parts: Any = record.header.get("parts")
    scale_bits: Any = record.header.get("scale_bits")
    in_units = scale_bits is None or (
        scale_bits in range(2, 9) and shape[1] % SUPER_BLOCK == 0 and _divides(size, SUPER_BLOCK)
    )
    if (
        not isinstance(parts, dict)
        or record.shape() != shape
        or bits not in range(2, 9)
        or not _divides(size, shape[1])
        or not in_units
    ):
        raise InputError(f"the archive's record {record.name!r} does not fit the model")
    return Scheme(bits, size, "zero_point" not in parts, scale_bits)


def _divides(size: Any, width: int) -> bool:
    return type(size) is int and (size == -1 or (size > 0 and width % size == 0))


def _decode(archive: ArchiveFile, name: str) -> CompressedWeight:
    """The weight of a record.

    Raises:
        InputError: it is damaged.
    """
    record = archive.read(name)
    rows, cols = record.shape()
    parts, header = record.parts(), record.header
    bits = header["bits"]
    size = cols if header["group_size"] == -1 else header["group_size"]
    groups = cols // size
    try:
        dtype, product = (DTYPES[header[key]] for key in ("scale_dtype", "product_dtype"))
        lowest = code_range(bits)[0]
        symbols = decode_symbols(parts["codes"], (rows, cols))
        codes = torch.from_numpy((symbols.astype(np.int16) + lowest).astype(np.int8))
        scale, super_scale = _decode_scales(record, dtype)
        zero_point = None
        if "zero_point" in parts:
            zeros = decode_symbols(parts["zero_point"], (rows, groups))
            zero_point = torch.from_numpy(zeros).to(torch.float32) + lowest
    except (InputError, KeyError) as error:
        raise InputError(f"{name} in {archive.path} is damaged: {error}") from None
    grid = Grid(scale, zero_point, bits, size, dtype, None if product == dtype else product)
    if super_scale is not None:
        grid = grid.in_units(super_scale, header["scale_bits"])
    return CompressedWeight(None, float("nan"), codes, grid)


def _decode_scales(record: Record, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scales float32 [rows, groups], or their multiples and what these are multiples of [rows, super-blocks].

    Raises:
        InputError, KeyError: they are damaged.
    """
    (rows, cols), parts, size = record.shape(), record.parts(), record.header["group_size"]
    groups = 1 if size == -1 else cols // size
    if record.header.get("scale_bits") is None:
        return decode_floats(parts["scale"], (rows, groups), dtype).to(torch.float32), None
    multiples = torch.from_numpy(decode_symbols(parts["scale"], (rows, groups)))
    units = decode_floats(parts["super_scale"], (rows, cols // SUPER_BLOCK), dtype)
    return multiples.to(torch.float32) - MIDDLE, units.to(torch.float32)


class ArchiveSource:
    """A :class:`~srcr.models.source.WeightSource` of the plain tensors of an archive beside a config.json;
    ``codes``: the headers of the others, by name."""

    def __init__(self, folder: Path, archive: ArchiveFile) -> None:
        check_causal(folder)
        self._folder, self._archive = folder, archive
        self.config: Any = config_of(plain_config(folder))
        headers = [archive.header(name) for name in archive.names()]
        for each in headers:
            if each.header.get("kind") not in (CODES, PLAIN):
                raise InputError(f"{archive.path} is damaged: {each.name} is of no kind")
        self.codes, self._plain = (
            {each.name: each for each in headers if each.header["kind"] == kind}
            for kind in (CODES, PLAIN)
        )

    def config_dict(self) -> dict[str, Any]:
        """``config.json`` as written."""
        return plain_config(self._folder)

    def names(self) -> Sequence[str]:
        """Every plain tensor."""
        return list(self._plain)

    def meta(self, name: str) -> Tensor:
        """A tensor's shape and precision."""
        record = self._plain[name]
        return torch.empty(record.shape(), dtype=_dtype(record), device="meta")

    def get(self, name: str) -> Tensor:
        """A tensor."""
        record = self._archive.read(name)
        return decode_floats(record.payload, record.shape(), _dtype(record))


def _dtype(record: Record) -> torch.dtype:
    name = record.header.get("dtype")
    if name not in DTYPES:
        raise InputError(f"the archive's record {record.name!r} is of the precision {name!r}")
    return DTYPES[name]


def _recognises(folder: Path) -> bool:
    return folder / ARCHIVE in containers(folder)


def _loaded_bytes(folder: Path, contents: Contents) -> LoadedBytes:
    """srcr unpacks everything into the model's precision."""
    checkpoint = _read(folder)
    plain = sum(checkpoint.meta(name).nbytes for name in checkpoint.plain_names())
    shapes = (contents.topology.shape(name) for name in checkpoint.contents.compressed)
    unpacked = sum(rows * cols for rows, cols in shapes) * checkpoint.dtype.itemsize
    return LoadedBytes(plain + unpacked, "srcr")


FORMAT = Format(
    name="archive",
    summary="one file, entropy-coded, for keeping and sending; srcr export unpacks it to the bit",
    check=_check,
    write=_write,
    read=_read,
    recognises=_recognises,
    layout=_layout,
    loaded_bytes=_loaded_bytes,
    load=dequantizing(_read),
    loader=lambda contents: "srcr",
    any_scale_dtype=True,
)
