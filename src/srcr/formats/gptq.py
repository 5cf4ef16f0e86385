"""``gptq``: the layout of AutoGPTQ, as GPTQModel and vLLM load it.

Codes of 2, 3, 4 and 8 bits, packed without gaps down each column of the transposed weight; zero-points along
the rows. Symmetric grids are ``checkpoint_format`` "gptq" (zero-points stored less 1), which every reader
takes. Those with zero-points are "gptq_v2": less 1, a zero-point of 0 has no number, and GPTQModel refuses
them. Groups lie as they stand in the file, so that ``g_idx`` is in order whatever the sweep's order was.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srcr.errors import InputError
from srcr.formats import Format
from srcr.formats.checkpoint import Checkpoint, Contents, Scheme, check_own_scales, dequantizing
from srcr.formats.shards import write_config, write_packed
from srcr.models.checkpoint import OpenModel
from srcr.models.config import quant_method, quantization_of
from srcr.models.matrices import MatrixRef
from srcr.models.source import CheckpointSource
from srcr.numerics.compressed import CompressedWeight
from srcr.numerics.grid import Grid, code_range
from srcr.numerics.packing import pack, unpack
from srcr.numerics.tensors import dtype_name
from srcr.plans.specs import ScaleDtype
from srcr.records.run import LoadedBytes
from srcr.storage.safetensors import TensorFiles

NAME = "gptq"
#: Values of ``checkpoint_format``: zero-points stored less 1, or as they are.
V1, V2 = "gptq", "gptq_v2"
#: What GPTQModel takes (``SUPPORTS_BITS`` without its planar widths, ``SUPPORTS_GROUP_SIZE``).
WIDTHS = (2, 3, 4, 8)
GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)
#: Bits of a word of packed numbers: those of a row and of a column of a weight fill whole ones.
WORD_BITS = 32
#: Widths of symmetric grids that vLLM's kernels take, and their group sizes.
VLLM_WIDTHS, VLLM_GROUP_SIZES = (4, 8), (-1, 32, 64, 128)


def check(contents: Contents) -> None:
    """Refuse what the layout, or GPTQModel, cannot hold.

    Raises:
        InputError: nothing is quantized; an embedding is; a stack of matrices; a width, a group size or a
            shape.
    """
    topology = contents.topology
    if not contents.schemes:
        raise InputError(
            "gptq holds quantized weights and this plan quantizes none (bits 16): use --format dense"
        )
    if tables := contents.embeddings():
        raise InputError(
            f"gptq does not hold {tables[0]} quantized: leave --embeddings out, or use --format "
            "compressed-tensors"
        )
    if contents.topology.experts:
        raise InputError(
            "gptq: srcr writes no mixtures of experts in it: use --format compressed-tensors or dense"
        )
    check_own_scales(contents, NAME)
    for name, scheme in contents.schemes.items():
        if topology.matrix(name).index is not None:
            raise InputError(
                f"gptq cannot hold {name}, which lies in a stack of matrices: use --format dense"
            )
        if scheme.num_bits not in WIDTHS:
            raise InputError(
                f"gptq has codes of 2, 3, 4 and 8 bits, and {name} has {scheme.num_bits}: use one of those, "
                "or --format compressed-tensors"
            )
        if scheme.group_size not in GROUP_SIZES:
            raise InputError(
                f"gptq's readers take groups of {', '.join(map(str, GROUP_SIZES[1:]))} columns, and {name} "
                f"has groups of {scheme.group_size}: use --group-size -1 or one of those"
            )
        shape = topology.shape(name)
        if any(size * scheme.num_bits % WORD_BITS for size in shape):
            together = WORD_BITS // math.gcd(WORD_BITS, scheme.num_bits)
            raise InputError(
                f"gptq packs {together} numbers of {scheme.num_bits} bits together, which does not divide "
                f"the {shape[0]} x {shape[1]} of {name}: leave it alone (--ignore), or use --format "
                "compressed-tensors"
            )


def notes(contents: Contents) -> list[str]:
    """That vLLM does not serve the contents, where it does not: linears that it fuses have their settings
    under a name that no file has, so that it takes only those that are alike everywhere."""
    schemes = set(contents.schemes.values())
    served = len(schemes) == 1 and all(
        scheme.symmetric
        and scheme.num_bits in VLLM_WIDTHS
        and scheme.group_size in VLLM_GROUP_SIZES
        for scheme in schemes
    )
    limits = "symmetric 4 or 8 bits in groups of 32, 64, 128 or whole rows, the same everywhere"
    return [] if served else [f"of the gptq layout vLLM takes {limits}: this is for GPTQModel"]


def scale_dtype(dtype: torch.dtype) -> ScaleDtype | None:
    """What scales of a model are stored in: no reader keeps any of 32 bits."""
    return "float16" if dtype == torch.float32 else None


def _stored_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float16 if dtype == torch.float32 else dtype


def _layout(
    ref: MatrixRef, shape: tuple[int, int], scheme: Scheme | None, dtype: torch.dtype
) -> Mapping[str, Tensor]:
    """Packed codes and zero-points, scales, the group of each column; a plain weight without a scheme."""
    module, (rows, cols) = ref.module, shape
    if scheme is None:
        return {ref.parameter: ref.stored(torch.empty(shape, dtype=dtype, device="meta"))}
    groups = 1 if scheme.group_size == -1 else cols // scheme.group_size
    bits = scheme.num_bits

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return {
        f"{module}.qweight": empty(torch.int32, cols * bits // WORD_BITS, rows),
        f"{module}.qzeros": empty(torch.int32, groups, rows * bits // WORD_BITS),
        f"{module}.scales": empty(_stored_dtype(dtype), groups, rows),
        f"{module}.g_idx": empty(torch.int32, cols),
    }


def _encode(
    ref: MatrixRef, weight: CompressedWeight, dtype: torch.dtype, version: str
) -> dict[str, Tensor]:
    """The tensors of :func:`_layout`, with data."""
    grid, module = weight.grid, ref.module
    if weight.codes is None or grid is None:
        return {ref.parameter: ref.stored(weight.dequantize().to(dtype)).contiguous()}
    lowest, _ = code_range(grid.num_bits)
    zeros = torch.zeros_like(grid.scale) if grid.zero_point is None else grid.zero_point
    zeros = zeros - lowest - (1 if version == V1 else 0)
    cols = weight.codes.shape[1]
    return {
        f"{module}.qweight": _pack(weight.codes.to(torch.int16) - lowest, grid.num_bits).T,
        f"{module}.qzeros": _pack(zeros.T, grid.num_bits),
        f"{module}.scales": _scales(module, weight.codes, grid, _stored_dtype(dtype)).T,
        f"{module}.g_idx": torch.arange(cols, dtype=torch.int32) // grid.group_size,
    }


def _pack(values: Tensor, num_bits: int) -> Tensor:
    """Numbers [n, m] as words int32 [n, m * num_bits / 32]."""
    packed = pack(values.to(torch.uint8).contiguous(), num_bits)
    return packed.view(torch.int32).view(len(values), -1)


def _unpack(words: Tensor, num_bits: int, count: int) -> Tensor:
    """The numbers uint8 [n, count] of words int32 [n, m]."""
    packed = words.contiguous().view(-1).view(torch.uint8)
    return unpack(packed, num_bits, (len(words), count))


def _scales(module: str, codes: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """The scales [rows, groups] in the precision that they are stored in.

    Raises:
        InputError: one is none of its numbers; that of a group of zeros may be anything.
    """
    stored = grid.scale.to(dtype)
    used = grid.steps(codes).view(len(codes), -1, grid.group_size).ne(0).any(dim=-1)
    wrong = stored.to(torch.float32).ne(grid.scale) & used
    if bool(wrong.any()):
        raise InputError(
            f"gptq stores scales in {dtype_name(dtype)} here, and {module} has one of "
            f"{float(grid.scale[wrong][0]):.9g}, which is none: rounding it would change the weights, so "
            "compress the original model with --format gptq"
        )
    return torch.where(used, stored, torch.where(stored.isfinite(), stored, 0))


def _write(checkpoint: Checkpoint, folder: Path) -> None:
    config = quantization_config(checkpoint.contents)
    write_config(checkpoint, folder, config)
    how = {"dtype": checkpoint.dtype, "version": config["checkpoint_format"]}
    write_packed(checkpoint, folder, _layout, partial(_encode, **how))


def quantization_config(contents: Contents) -> dict[str, Any]:
    """The ``quantization_config`` of config.json: the most frequent scheme, and under ``dynamic`` those that
    differ, by patterns of their names ("-:" before what is not quantized)."""
    base, _ = Counter(contents.schemes.values()).most_common(1)[0]
    dynamic: dict[str, dict[str, Any]] = {}
    for name in contents.topology.linears():
        scheme, pattern = contents.schemes.get(name), f"^{re.escape(name)}$"
        if scheme is None:
            dynamic[f"-:{pattern}"] = {}
        elif scheme != base:
            dynamic[f"+:{pattern}"] = _settings(scheme)
    symmetric = all(scheme.symmetric for scheme in contents.schemes.values())
    config = {
        "quant_method": NAME,
        "checkpoint_format": V1 if symmetric else V2,
        "pack_dtype": "int32",
        **_settings(base),
        "desc_act": False,
        "lm_head": False,
    }
    return config | ({"dynamic": dynamic} if dynamic else {})


def _settings(scheme: Scheme) -> dict[str, Any]:
    return {"bits": scheme.num_bits, "group_size": scheme.group_size, "sym": scheme.symmetric}


def scheme_of(quantization: Mapping[str, Any], name: str) -> Scheme:
    """The scheme of a linear by a ``quantization_config``.

    Raises:
        InputError: it is none of this layout.
    """
    settings = dict(quantization)
    for pattern, changes in (quantization.get("dynamic") or {}).items():
        if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), name):
            settings |= changes
            break
    bits, size = settings.get("bits"), settings.get("group_size", -1)
    if bits not in WIDTHS or type(size) is not int or (size != -1 and size < 1):
        raise InputError(
            f"{name} is quantized by gptq to {bits!r} bits in groups of {size!r}: srcr reads 2, 3, 4 and 8 "
            "bits"
        )
    return Scheme(bits, size, bool(settings.get("sym", True)))


def _read(folder: Path) -> Checkpoint:
    """The checkpoint, codes and grids as stored; masks and errors are not.

    Raises:
        InputError: another checkpoint_format, or nothing is quantized.
    """
    quantization = quantization_of(folder)
    version = quantization.get("checkpoint_format", quantization.get("format", V1))
    files = TensorFiles(folder)
    if version not in (V1, V2) or not any(name.endswith(".qweight") for name in files.entries):
        raise InputError(
            f"{folder} is quantized by 'gptq' in a form that srcr does not read (checkpoint_format "
            f"{version!r}): give the original, unquantized model"
        )
    opened = OpenModel(str(folder), CheckpointSource(folder), folder)
    topology = opened.topology
    stored = [
        name
        for name in [*topology.linears(), *topology.embeddings]
        if f"{topology.matrix(name).module}.qweight" in files
    ]
    schemes = {name: scheme_of(quantization, name) for name in stored}
    contents = Contents(topology, opened.config, schemes, tuple(stored))
    return Checkpoint.of(opened, contents, partial(_decode, files, contents, opened.dtype, version))


def _decode(
    files: TensorFiles, contents: Contents, dtype: torch.dtype, version: str, name: str
) -> CompressedWeight:
    """The weight of a linear.

    Raises:
        InputError: its tensors do not fit it, or its columns are not grouped in order.
    """
    ref, scheme = contents.topology.matrix(name), contents.schemes[name]
    module, (rows, cols) = ref.module, contents.topology.shape(name)
    size = cols if scheme.group_size == -1 else scheme.group_size
    for key, meta in _layout(ref, (rows, cols), scheme, dtype).items():
        if key not in files or files.meta(key).shape != meta.shape:
            raise InputError(f"{key} in {files.folder} is missing or does not fit the model")
    order = torch.arange(cols, dtype=torch.int32) // size
    if not torch.equal(files.get(f"{module}.g_idx"), order):
        raise InputError(
            f"{name} in {files.folder} has its columns grouped by activation order (desc_act), which srcr "
            "does not read: compress the original model"
        )
    lowest, _ = code_range(scheme.num_bits)
    codes = _unpack(files.get(f"{module}.qweight").T, scheme.num_bits, cols)
    zeros = _unpack(files.get(f"{module}.qzeros"), scheme.num_bits, rows).T.to(torch.float32)
    zeros = zeros + lowest + (1 if version == V1 else 0)
    if bool((zeros > code_range(scheme.num_bits)[1]).any()) or (
        scheme.symmetric and bool(zeros.any())
    ):
        raise InputError(f"{module}.qzeros in {files.folder} has zero-points that are no codes")
    scale = files.get(f"{module}.scales").T.contiguous()
    grid = Grid(
        scale.to(torch.float32),
        None if scheme.symmetric else zeros.contiguous(),
        scheme.num_bits,
        size,
        scale.dtype,
        None if scale.dtype == dtype else dtype,
    )
    return CompressedWeight(
        None, float("nan"), (codes.to(torch.int16) + lowest).to(torch.int8), grid
    )


def _recognises(folder: Path) -> bool:
    return quant_method(folder) == NAME


def _loaded_bytes(folder: Path, _: Contents) -> LoadedBytes:
    """GPTQModel keeps every tensor as it is stored."""
    return LoadedBytes(sum(TensorFiles(folder).sizes().values()), "gptqmodel")


FORMAT = Format(
    name=NAME,
    summary="the layout of AutoGPTQ: codes of 2, 3, 4 and 8 bits, as GPTQModel and vLLM load them",
    check=check,
    write=_write,
    read=_read,
    recognises=_recognises,
    layout=_layout,
    loaded_bytes=_loaded_bytes,
    load=dequantizing(_read),
    notes=notes,
    loader=lambda contents: "srcr",
    scale_dtype=scale_dtype,
)
