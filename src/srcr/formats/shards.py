"""The files of a Hugging Face folder: config, and weights in shards of at most 1 GB, a tensor at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from srcr.formats.checkpoint import Checkpoint, Scheme
from srcr.models.matrices import MatrixRef
from srcr.models.topology import Topology
from srcr.numerics.compressed import CompressedWeight
from srcr.serialize import to_json
from srcr.storage.index import INDEX
from srcr.storage.layout import CONFIG
from srcr.storage.safetensors import TensorFileWriter

MAX_SHARD = "1GB"


def write_config(
    checkpoint: Checkpoint, folder: Path, quantization: Mapping[str, Any] | None = None
) -> None:
    """Write config.json, with a ``quantization_config`` where there is one, and the model's other files."""
    config = dict(checkpoint.config)
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    (folder / CONFIG).write_text(to_json(config), encoding="utf-8")
    checkpoint.save_companions(folder)


def write_shards(
    folder: Path,
    topology: Topology,
    layout: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Write ``tensors``, which come in any order, into the files that their ``layout`` (shapes and
    precisions, no data) gives, blocks first; and an index where there are several."""
    with _open_shards(folder, topology, layout, ()) as (writers, files):
        for name, tensor in tensors:
            writers[files[name]].write(name, tensor)


def write_weights(
    checkpoint: Checkpoint,
    folder: Path,
    layout: Mapping[str, Tensor],
    encode: Callable[[Sequence[str]], Iterable[tuple[str, Tensor]]],
) -> None:
    """Write a checkpoint's weights into the files that their ``layout`` gives: ``encode`` gives the tensors
    of compressed weights, asked for a block at a time; then come the others. ``checkpoint.moving`` is told of
    each block, and blocks that it has moved before are left as they are."""
    contents, moving = checkpoint.contents, checkpoint.moving
    blocks = contents.blocks
    before = [None if moving is None else moving.moved(i) for i in range(len(blocks))]
    there = [name for names in before for name in names or ()]
    with _open_shards(folder, contents.topology, layout, there) as (writers, files):
        for number, names in enumerate(blocks):
            if before[number] is not None or not names:
                continue
            places: dict[str, list[str]] = {}
            for name, tensor in encode(names):
                writers[files[name]].write(name, tensor)
                places.setdefault(files[name], []).append(name)
            if moving is not None:
                moving.move(number, places)
        in_blocks = {name for names in blocks for name in names}
        for name, tensor in encode([n for n in contents.compressed if n not in in_blocks]):
            writers[files[name]].write(name, tensor)
        for name in checkpoint.plain_names():
            writers[files[name]].write(name, checkpoint.tensor(name))


def write_packed(
    checkpoint: Checkpoint,
    folder: Path,
    layout: Callable[
        [MatrixRef, tuple[int, int], Scheme | None, torch.dtype], Mapping[str, Tensor]
    ],
    encode: Callable[[MatrixRef, CompressedWeight], Mapping[str, Tensor]],
) -> None:
    """:func:`write_weights` of a format that stores each compressed weight as the tensors that its ``layout``
    names and ``encode`` makes."""
    contents, matrix = checkpoint.contents, checkpoint.contents.topology.matrix
    tensors = {name: checkpoint.meta(name) for name in checkpoint.plain_names()}
    for name in contents.compressed:
        shape, scheme = contents.topology.shape(name), contents.schemes.get(name)
        tensors |= layout(matrix(name), shape, scheme, checkpoint.dtype)

    def encode_all(names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            yield from encode(matrix(name), checkpoint.read(name)).items()

    write_weights(checkpoint, folder, tensors, encode_all)


@contextmanager
def _open_shards(
    folder: Path, topology: Topology, layout: Mapping[str, Tensor], there: Sequence[str]
) -> Iterator[tuple[dict[str, TensorFileWriter], dict[str, str]]]:
    """The writers of the files that a layout gives, by their names, and the file of each tensor; an index
    where there are several. The tensors ``there`` are in them already."""
    ordered = {name: layout[name] for name in _blocks_first(layout, topology)}
    split = split_torch_state_dict_into_shards(ordered, max_shard_size=MAX_SHARD)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(to_json(index), encoding="utf-8")
    with ExitStack() as stack:
        writers = {}
        for file, names in split.filename_to_tensors.items():
            part = {name: layout[name] for name in names}
            kept = [name for name in there if name in part]
            writers[file] = stack.enter_context(TensorFileWriter(folder / file, part, kept))
        yield writers, split.tensor_to_filename


def _blocks_first(names: Iterable[str], topology: Topology) -> Iterator[str]:
    """The names of each block, sorted, in the blocks' order; then the others as they come."""
    prefixes = [f"{block.name}." for block in topology.blocks]
    blocks: dict[str, list[str]] = {prefix: [] for prefix in prefixes}
    rest: list[str] = []
    for name in names:
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        (rest if prefix is None else blocks[prefix]).append(name)
    for block in blocks.values():
        yield from sorted(block)
    yield from rest
