"""The files of a Hugging Face folder: config, and weights in shards of at most 1 GB, a tensor at a time."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from srcr.formats.checkpoint import Checkpoint
from srcr.models.topology import Topology
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
    ordered = {name: layout[name] for name in _blocks_first(layout, topology)}
    split = split_torch_state_dict_into_shards(ordered, max_shard_size=MAX_SHARD)
    with ExitStack() as stack:
        writers = {}
        for file, names in split.filename_to_tensors.items():
            part = {name: layout[name] for name in names}
            writers[file] = stack.enter_context(TensorFileWriter(folder / file, part))
        for name, tensor in tensors:
            writers[split.tensor_to_filename[name]].write(name, tensor)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(to_json(index), encoding="utf-8")


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
