"""The safetensors files of one folder, read by tensor name; names in an index stay in the folder."""

import json
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

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


class TensorFiles:
    """Reads tensors by name from a checkpoint folder, sharded or not, or from some files of it. A context
    manager.

    Raises:
        InputError: no weights, a damaged file, a tensor that is in two files or not in the one that the
            index says, or an index that points outside the folder.
    """

    def __init__(self, folder: Path, paths: Sequence[Path] | None = None) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._where: dict[str, Any] = {}
        self._paths: dict[str, Path] = {}
        self.paths = weight_files(folder) if paths is None else list(paths)
        for path in self.paths:
            try:
                stream = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                self._stack.close()
                raise InputError(f"{path} is not a valid safetensors file: {error}") from None
            for name in stream.keys():  # noqa: SIM118 - not a dict
                if name in self._paths:
                    self._stack.close()
                    raise InputError(
                        f"the tensor {name!r} is in two files, {self._paths[name]} and {path}: keep one"
                    )
                self._where[name] = stream
                self._paths[name] = path
        if paths is None and self.paths != [folder / SINGLE] and (folder / INDEX).is_file():
            self._check_index()

    def _check_index(self) -> None:
        for name, file in read_index(self.folder).items():
            if self._paths.get(name, self.folder / file) != self.folder / file:
                self._stack.close()
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
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def names(self) -> list[str]:
        """Every tensor's name."""
        return list(self._where)

    def paths_by_name(self) -> dict[str, Path]:
        """The file of each tensor."""
        return {name: self._paths[name] for name in self._where}

    def get(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            InputError: there is none of that name.
        """
        if name not in self._where:
            raise InputError(f"{self.folder} has no tensor {name!r}")
        tensor = self._where[name].get_tensor(name)
        assert isinstance(tensor, Tensor)
        return tensor

    def empty(self) -> dict[str, Tensor]:
        """Every tensor's name, with its shape and precision but no data."""
        return {name: self.get(name).to("meta") for name in self._where}

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
