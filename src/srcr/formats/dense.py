"""``dense``: plain safetensors in the base model's precision, for every engine and every plan."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from srcr.formats import Format
from srcr.formats.checkpoint import Checkpoint, Contents, Scheme
from srcr.formats.shards import write_config, write_weights
from srcr.models.checkpoint import open_model
from srcr.models.config import is_quantized
from srcr.models.matrices import MatrixRef
from srcr.records.run import LoadedBytes
from srcr.storage.index import containers
from srcr.storage.safetensors import TensorFiles


def _check(contents: Contents) -> None:
    """Everything fits."""


def _layout(
    ref: MatrixRef, shape: tuple[int, int], scheme: Scheme | None, dtype: torch.dtype
) -> Mapping[str, Tensor]:
    """The parameter in ``dtype``, whatever the scheme."""
    return {ref.parameter: ref.stored(torch.empty(shape, dtype=dtype, device="meta"))}


def _write(checkpoint: Checkpoint, folder: Path) -> None:
    """Every parameter and buffer."""
    checkpoint = checkpoint.stored()
    write_config(checkpoint, folder)
    matrix = checkpoint.contents.topology.matrix

    def encode(names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        for parameter in dict.fromkeys(matrix(name).parameter for name in names):
            yield parameter, checkpoint.tensor(parameter)

    layout = {name: checkpoint.meta(name) for name in checkpoint.tensors.names()}
    write_weights(checkpoint, folder, layout, encode)


def _read(folder: Path) -> Checkpoint:
    """A checkpoint of which nothing is compressed: the files say neither which weights were rounded, nor on
    which grid."""
    return Checkpoint.of(open_model(folder))


def _recognises(folder: Path) -> bool:
    """Nothing tells a dense checkpoint from any other that is not quantized."""
    return not is_quantized(folder) and not containers(folder)


def _loaded_bytes(folder: Path, _: Contents) -> LoadedBytes:
    """Every tensor, as stored."""
    return LoadedBytes(sum(TensorFiles(folder).sizes().values()), "transformers")


FORMAT = Format(
    name="dense",
    summary="plain weights in the base's precision, for every engine; no smaller on disk",
    check=_check,
    write=_write,
    read=_read,
    recognises=_recognises,
    layout=_layout,
    loaded_bytes=_loaded_bytes,
    any_scale_dtype=True,
)
