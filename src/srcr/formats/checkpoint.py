"""Writes a checkpoint folder so that it appears whole or not at all.

Everything goes to ``OUT.partial``, is read back and compared, and only then takes the name OUT.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from srcr.errors import InputError, SrcrError, VerificationError
from srcr.files import RECORD, check_place
from srcr.formats import Format
from srcr.models.load import COMPANION_PATTERNS, INDEX, load_model, read_config
from srcr.models.topology import Topology, linear_weight
from srcr.types import CompressedWeight, CompressionPlan

#: In a folder that srcr is writing: it may be replaced.
MARK = ".srcr-in-progress"
#: One key: safetensors writes several in random order, and the same run must give the same bytes.
METADATA = {"format": "pt"}
MAX_SHARD = "5GB"


def check_output(out: Path, model: Path, overwrite: bool) -> None:
    """Refuse to lose anything.

    Raises:
        InputError: OUT exists, or a leftover ``OUT.partial`` does, and ``overwrite`` is not given; either
            holds what srcr did not write, or is or holds the model; an earlier result was left aside.
    """
    check_place(out)
    source = model.resolve()
    for path in (out, partial_path(out), _aside(out)):
        if path.resolve() == source or path.resolve() in source.parents:
            raise InputError(f"output {path} is or holds the model itself: choose another folder")
    if _exists(_aside(out)):
        raise InputError(
            f"{_aside(out)} exists: the earlier {out.name} that an interrupted run had put aside. Move it "
            "back or remove it first"
        )
    for path, mark in ((out, RECORD), (partial_path(out), MARK)):
        if not _exists(path):
            continue
        if not overwrite:
            raise InputError(
                f"output {path} exists: choose another name, remove it, or use --overwrite"
            )
        if path.is_symlink() or not path.is_dir():
            raise InputError(f"output {path} is not a folder: srcr will not replace it")
        if not (path / mark).is_file() and any(path.iterdir()):
            raise InputError(
                f"output {path} holds files that srcr did not write (no {mark}): it will not be replaced, "
                "even with --overwrite"
            )


def partial_path(out: Path) -> Path:
    """Where work in progress lies."""
    return out.with_name(out.name + ".partial")


def _aside(out: Path) -> Path:
    """Where the earlier result waits while the new one takes its name."""
    return out.with_name(out.name + ".replaced")


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


@contextmanager
def whole_or_nothing(out: Path, model: Path, overwrite: bool) -> Iterator[Path]:
    """A fresh ``OUT.partial`` to write into; on success it becomes OUT, on failure it is removed.

    What :func:`check_output` refuses is refused again before the name is taken: a run may be long.

    Raises:
        InputError: as :func:`check_output`.
        SrcrError: the disk refuses.
    """
    check_output(out, model, overwrite)
    partial = partial_path(out)
    made = [path for path in partial.parents if not path.exists()]
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        (partial / MARK).touch()
        yield partial
        (partial / MARK).unlink()
        _take_name(partial, out, model, overwrite)
    except (OSError, SafetensorError) as error:
        _remove(partial, made)
        raise SrcrError(
            f"writing {out} failed: {error}; nothing was left behind, make room or choose another place"
        ) from error
    except BaseException:
        _remove(partial, made)
        raise


def _take_name(partial: Path, out: Path, model: Path, overwrite: bool) -> None:
    """Rename, with an earlier result put aside until the new one is in its place."""
    if not _exists(out):
        partial.rename(out)
        return
    (partial / MARK).touch()
    check_output(out, model, overwrite)
    (partial / MARK).unlink()
    out.rename(_aside(out))
    try:
        partial.rename(out)
    except OSError:
        _aside(out).rename(out)
        raise
    shutil.rmtree(_aside(out))


def _remove(partial: Path, parents: list[Path]) -> None:
    """Remove what this run made: the partial folder, and parents that are still empty."""
    shutil.rmtree(partial, ignore_errors=True)
    for path in parents:
        with suppress(OSError):
            path.rmdir()


def write_weights(
    folder: Path,
    model: Any,
    topology: Topology,
    compressed: Mapping[str, CompressedWeight],
    fmt: Format,
    dtype: torch.dtype,
) -> None:
    """All weights of ``model``, the compressed ones in the format's own tensors, in shards."""
    state: dict[str, Tensor] = {}
    tied = f"{topology.head}.weight" if topology.tied else None
    for name, tensor in model.state_dict().items():
        layer, _, kind = name.rpartition(".")
        if name == tied:
            continue
        if kind == "weight" and layer in compressed:
            transposed = layer in topology.conv1d
            state.update(fmt.tensors(layer, compressed[layer], dtype, transposed))
        else:
            state[name] = tensor.contiguous()
    split = split_torch_state_dict_into_shards(state, max_shard_size=MAX_SHARD)
    for filename, names in split.filename_to_tensors.items():
        path = folder / filename
        path.touch()  # with the user's own permissions, which safetensors would make stricter
        mode = path.stat().st_mode
        save_file({name: state[name] for name in names}, path, metadata=METADATA)
        path.chmod(mode)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / INDEX, index)


def write_config(
    folder: Path, source: Path, plan: CompressionPlan, topology: Topology, fmt: Format
) -> None:
    """The base model's config with the format's ``quantization_config``, and every file beside the
    weights that belongs to the model (tokenizer, generation config, licence)."""
    config = read_config(source)
    config.pop("quantization_config", None)
    quantization = fmt.quantization_config(plan, topology)
    if quantization is not None:
        config["quantization_config"] = quantization
    write_json(folder / "config.json", config)
    for pattern in COMPANION_PATTERNS:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and path.suffix != ".safetensors":
                shutil.copyfile(path, folder / path.name)


def write_json(path: Path, data: Any) -> None:
    """JSON with two spaces and a final newline."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@torch.no_grad()
def verify(
    folder: Path,
    model: Any,
    topology: Topology,
    compressed: Mapping[str, CompressedWeight],
    fmt: Format,
    dtype: torch.dtype,
) -> None:
    """Read the folder back: codes, dequantized weights, zeros, then logits through transformers.

    ``model`` is given the compressed weights in place, and must agree with what transformers loads.

    Raises:
        VerificationError: names the layer, or the logits, that differ.
    """
    for name, weight, codes in fmt.read(folder, list(compressed), topology.conv1d):
        expected = compressed[name]
        wanted = expected.dequantize().to(dtype)
        if not torch.equal(weight.to(dtype), wanted):
            raise VerificationError(f"{name} in {folder} does not read back as it was computed")
        if (
            codes is not None
            and expected.codes is not None
            and not torch.equal(codes, expected.codes)
        ):
            raise VerificationError(f"the codes of {name} in {folder} do not read back as written")
        if expected.mask is not None and bool((weight[~expected.mask] != 0).any()):
            raise VerificationError(f"pruned weights of {name} in {folder} are not zero")
        linear_weight(model.get_submodule(name)).copy_(wanted)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = ((torch.arange(16) * 5 + 1) % vocabulary)[None]
    ours = model(tokens.to(model.device), use_cache=False).logits.float().cpu()
    theirs = load_model(folder)(tokens, use_cache=False).logits.float()
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3):
        worst = float((ours - theirs).abs().max())
        raise VerificationError(
            f"transformers loads {folder} to other logits (largest difference {worst:.3g})"
        )
