"""The safetensors files of one folder, read by tensor name; names in an index stay in the folder."""

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from srcr.errors import InputError
from srcr.models.load import INDEX, SINGLE, read_index, weight_files

#: One key: safetensors writes several in random order, and the same run must give the same bytes.
METADATA = {"format": "pt"}


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a file with the user's own permissions, which safetensors would make stricter."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=METADATA)
    path.chmod(mode)


#: Names of precisions in the format, largest alignment first: the order in which tensors are laid out.
_DTYPES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32",
    torch.bfloat16: "BF16", torch.float16: "F16", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def stream_tensors(shapes: Mapping[str, Tensor], read: Callable[[str], Tensor], path: Path) -> None:
    """:func:`save_tensors` with one tensor in memory at a time: ``shapes`` have no data (meta), ``read``
    gives it by name. The same bytes as safetensors writes, whose own function wants all at once."""
    order = list(_DTYPES)
    names = sorted(shapes, key=lambda name: (order.index(shapes[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": METADATA}
    stop = 0
    for name in names:
        start, stop = stop, stop + shapes[name].nbytes
        header[name] = {
            "dtype": _DTYPES[shapes[name].dtype],
            "shape": list(shapes[name].shape),
            "data_offsets": [start, stop],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            data = read(name).contiguous().reshape(-1).view(torch.uint8)
            stream.write(data.numpy().data)


class TensorFiles:
    """Reads tensors by name from a checkpoint folder, sharded or not, or from some files of it. A context
    manager.

    Raises:
        InputError: no weights, a damaged file, a tensor that is in two files or not in the one that the
            index says, or an index that points outside the folder.
    """

    def __init__(self, folder: Path, paths: Sequence[Path] | None = None) -> None:
        self.folder = folder
        self._paths: dict[str, Path] = {}
        self.paths = weight_files(folder) if paths is None else list(paths)
        for path in self.paths:
            try:
                with safe_open(path, framework="pt") as stream:
                    names = list(stream.keys())
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path} is not a valid safetensors file: {error}") from None
            for name in names:
                if name in self._paths:
                    raise InputError(
                        f"the tensor {name!r} is in two files, {self._paths[name]} and {path}: keep one"
                    )
                self._paths[name] = path
        if paths is None and self.paths != [folder / SINGLE] and (folder / INDEX).is_file():
            self._check_index()

    def _check_index(self) -> None:
        for name, file in read_index(self.folder).items():
            if self._paths.get(name, self.folder / file) != self.folder / file:
                raise InputError(
                    f"{self.folder / INDEX} says that {name!r} is in {file}, but it is in "
                    f"{self._paths[name].name}"
                )

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing is open: a mapped file would count as memory for as long as it is."""

    def __contains__(self, name: str) -> bool:
        return name in self._paths

    def names(self) -> list[str]:
        """Every tensor's name."""
        return list(self._paths)

    def paths_by_name(self) -> dict[str, Path]:
        """The file of each tensor."""
        return dict(self._paths)

    def get(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            InputError: there is none of that name.
        """
        if name not in self._paths:
            raise InputError(f"{self.folder} has no tensor {name!r}")
        with safe_open(self._paths[name], framework="pt") as stream:
            tensor: Tensor = stream.get_tensor(name)
            return tensor.clone()

    def empty(self) -> dict[str, Tensor]:
        """Every tensor's name, with its shape and precision but no data."""
        return {name: self.get(name).to("meta") for name in self._paths}

    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor's data."""
        return {name: stop - start for name, (start, stop) in self._entries("data_offsets").items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Each tensor's shape."""
        return {name: tuple(shape) for name, shape in self._entries("shape").items()}

    def _entries(self, key: str) -> dict[str, list[int]]:
        """One entry of the header of each tensor; safetensors has checked it."""
        return {
            name: entry[key]
            for path in self.paths
            for name, entry in _header(path).items()
            if name != "__metadata__"
        }


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    assert isinstance(header, dict)
    return header
