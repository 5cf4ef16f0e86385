"""Writes a checkpoint folder so that it appears whole or not at all.

Everything goes to ``OUT.partial``, is read back and compared, and only then takes the name OUT.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from torch import Tensor

from srcr import memory
from srcr.errors import InputError, SrcrError, VerificationError
from srcr.files import RECORD, check_place
from srcr.formats import Format
from srcr.formats.journal import MARK, Journal, finished_blocks
from srcr.formats.safetensors_files import TensorFiles, stream_tensors
from srcr.metrics.rates import file_bytes
from srcr.models.guard import COMPANION_PATTERNS
from srcr.models.load import INDEX, load_model, read_config
from srcr.models.streaming import filled
from srcr.models.topology import Topology
from srcr.models.weights import ModelWeights
from srcr.types import CompressedWeight, CompressionPlan

MAX_SHARD = "1GB"
#: What loading a model through transformers takes, as a multiple of the original's files.
LOADING = 2
#: Bytes that are nothing beside what Python with torch takes.
LITTLE = 1 << 26


def check_output(out: Path, model: Path, overwrite: bool, resume: bool = False) -> None:
    """Refuse to lose anything.

    Raises:
        InputError: OUT exists, or a leftover ``OUT.partial`` does, and neither ``overwrite`` nor ``resume``
            is given; either holds what srcr did not write, or is or holds the model; an earlier result was
            left aside.
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
        if not (overwrite or resume):
            remedy = (
                "--overwrite" if path == out else "--resume to continue it, --overwrite to drop it"
            )
            raise InputError(
                f"output {path} exists: choose another name, remove it, or use {remedy}"
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
def whole_or_nothing(
    out: Path, model: Path, overwrite: bool, resume: bool = False
) -> Iterator[Journal]:
    """``OUT.partial`` to write into, through its journal; on success it becomes OUT.

    With ``resume`` what an earlier run left there stays, else it begins empty. What has finished blocks
    when a run is interrupted, or the disk refuses, stays as well; after any other failure nothing does
    (but with ``resume``, what was there before).
    What :func:`check_output` refuses is refused again before the name is taken: a run may be long.

    Raises:
        InputError: as :func:`check_output`; another run is writing into ``OUT.partial``.
        SrcrError: the disk refuses.
        KeyboardInterrupt: the user interrupts; it says how to continue.
    """
    check_output(out, model, overwrite, resume)
    partial = partial_path(out)
    made = [path for path in partial.parents if not path.exists()]
    try:
        partial.mkdir(parents=True, exist_ok=True)
        journal = Journal(partial)
    except OSError as error:
        _remove(partial, made)
        raise _refused(out, error) from error
    try:
        if not resume:
            _clear(partial)
        yield journal
        journal.close()
        (partial / MARK).unlink()
        _take_name(partial, out, model, overwrite)
    except (OSError, SafetensorError, KeyboardInterrupt) as error:
        journal.close()
        kept = finished_blocks(partial)
        if not kept:
            _remove(partial, made)
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(_kept(partial, kept)) from None
        raise _refused(out, error, _kept(partial, kept)) from error
    except BaseException:
        journal.close()
        if not (resume and finished_blocks(partial)):
            _remove(partial, made)
        raise


def _refused(out: Path, error: Exception, kept: str = "nothing was left behind") -> SrcrError:
    return SrcrError(f"writing {out} failed: {error}; {kept}, make room or choose another place")


def _kept(partial: Path, blocks: int) -> str:
    """What an interrupted run leaves."""
    if not blocks:
        return "nothing was left behind"
    what = f"{blocks} finished blocks are" if blocks > 0 else "what was finished is"
    return f"{what} in {partial}: the same command with --resume continues"


def _clear(partial: Path) -> None:
    """Empty a folder but for its journal, which is locked and emptied too."""
    for path in partial.iterdir():
        if path.name == MARK:
            os.truncate(path, 0)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


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


def block_tensors(
    source: ModelWeights,
    index: int,
    compressed: Mapping[str, CompressedWeight],
    fmt: Format,
) -> dict[str, Tensor]:
    """All tensors of a block, the compressed ones in the format's own form."""
    prefix = source.topology.blocks[index].name + "."
    state: dict[str, Tensor] = {}
    for name in source.names():
        layer, _, kind = name.rpartition(".")
        if not name.startswith(prefix):
            continue
        if kind == "weight" and layer in compressed:
            transposed = layer in source.topology.conv1d
            state.update(fmt.tensors(layer, compressed[layer], source.dtype, transposed))
        else:
            state[name] = source.tensor(name).contiguous()
    return state


def pack(journal: Journal, source: ModelWeights) -> None:
    """The blocks' files and the weights outside the blocks, together in shards; the blocks' files go."""
    folder = journal.folder
    blocks = [journal.file(entry["block"]) for entry in journal.entries]
    inside = tuple(f"{block.name}." for block in source.topology.blocks)
    outside = [name for name in source.names() if not name.startswith(inside)]
    with TensorFiles(folder, blocks) as files:

        def read(name: str) -> Tensor:
            return files.get(name) if name in files else source.tensor(name).contiguous()

        shapes = files.empty() | {name: source.tensor(name).to("meta") for name in outside}
        split = split_torch_state_dict_into_shards(shapes, max_shard_size=MAX_SHARD)
        for filename, names in split.filename_to_tensors.items():
            stream_tensors({name: shapes[name] for name in names}, read, folder / filename)
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            write_json(folder / INDEX, index)
        with TensorFiles(folder, [folder / name for name in split.filename_to_tensors]) as written:
            for name in shapes:
                if not torch.equal(written.get(name), read(name)):
                    raise VerificationError(
                        f"{name} in {folder} does not read back as it was written"
                    )
    for path in blocks:
        path.unlink()


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


def verify_block(
    folder: Path,
    path: Path,
    compressed: Mapping[str, CompressedWeight],
    topology: Topology,
    fmt: Format,
    dtype: torch.dtype,
) -> None:
    """Read a block's file back: codes, dequantized weights, zeros.

    Raises:
        VerificationError: names the layer that differs.
    """
    for name, weight, codes in fmt.read(folder, list(compressed), topology.conv1d, [path]):
        expected = compressed[name]
        if not torch.equal(weight.to(dtype), expected.dequantize().to(dtype)):
            raise VerificationError(f"{name} in {folder} does not read back as it was computed")
        if (
            codes is not None
            and expected.codes is not None
            and not torch.equal(codes, expected.codes)
        ):
            raise VerificationError(f"the codes of {name} in {folder} do not read back as written")
        if expected.mask is not None and bool((weight[~expected.mask] != 0).any()):
            raise VerificationError(f"pruned weights of {name} in {folder} are not zero")


def logits_fit(base: Path) -> bool:
    """Whether transformers can load a model as large as ``base`` in no more memory than this process has
    taken already, or in very little: so what a run takes does not depend on how deep the model is."""
    memory.release()
    taken = memory.peak() - memory.resident(torch.device("cpu"))
    return LOADING * file_bytes(base) <= max(taken, LITTLE)


class _Compressed:
    """The tensors of a model by name, where those of its linears are what ``folder`` stands for."""

    def __init__(self, folder: Path, source: ModelWeights, fmt: Format) -> None:
        self._folder, self._source, self._fmt = folder, source, fmt

    def get(self, name: str) -> Tensor:
        """One tensor, in the model's precision."""
        layer, _, kind = name.rpartition(".")
        if kind != "weight" or layer not in self._source.topology.shapes:
            return self._source.tensor(name)
        conv1d = self._source.topology.conv1d
        ((_, weight, _),) = self._fmt.read(self._folder, [layer], conv1d)
        return (weight.T if layer in conv1d else weight).to(self._source.dtype)


@torch.no_grad()
def verify_logits(folder: Path, source: ModelWeights, fmt: Format) -> None:
    """The model of ``source`` with the weights that ``folder`` stands for, one at a time, against what
    transformers loads.

    Raises:
        VerificationError: the logits differ.
    """
    vocabulary = source.model.get_input_embeddings().weight.shape[0]
    tokens = ((torch.arange(16) * 5 + 1) % vocabulary)[None]
    with filled(source.model, _Compressed(folder, source, fmt)):
        ours = source.model(tokens, use_cache=False).logits.float()
    theirs = load_model(folder)(tokens, use_cache=False).logits.float()
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3):
        worst = float((ours - theirs).abs().max())
        raise VerificationError(
            f"transformers loads {folder} to other logits (largest difference {worst:.3g})"
        )
