"""Token ids that a model wrote before, kept in the user's cache folder: writing them is slow.

A file holds rows that were written together. Its name is a hash of all that decides them, and it holds a hash
of what it should hold: what is damaged is written again. Nothing depends on the cache but time.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from srcr.errors import first_line

#: Changes when other text is written for the same settings.
VERSION = 1
#: The one key of a file's metadata.
METADATA_KEY = "srcr"


@dataclass(frozen=True, eq=False)
class TextCache:
    """What was written before by a model, of which everything that decides its text is in ``writer``;
    ``say`` is told what people should know. Files lie in ``folder``."""

    folder: Path
    writer: Mapping[str, Any]
    say: Callable[[str], None]

    def path(self, settings: Mapping[str, Any]) -> Path:
        """The file of rows that the model writes by these settings."""
        decides = json.dumps({"version": VERSION, **self.writer, **settings}, sort_keys=True)
        return self.folder / f"{hashlib.sha256(decides.encode()).hexdigest()[:32]}.safetensors"

    def read(self, settings: Mapping[str, Any], shape: tuple[int, int]) -> Tensor | None:
        """The rows int64 of this shape; None where they have not been written, or the file is damaged, which
        is said."""
        path = self.path(settings)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as stream:
                ids: Tensor = stream.get_tensor("input_ids")
                metadata = stream.metadata() or {}
        except (OSError, SafetensorError) as error:
            self.say(f"text in {path} cannot be read ({first_line(error)}): written again")
            return None
        if tuple(ids.shape) != shape or metadata.get(METADATA_KEY) != _digest(ids):
            self.say(f"text in {path} is damaged: written again")
            return None
        return ids

    def keep(self, settings: Mapping[str, Any], ids: Tensor) -> None:
        """Keep rows int64 [n, len]; where that cannot be, it is said."""
        path = self.path(settings)
        partial = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=path.name, suffix=".partial", dir=self.folder)
            os.close(handle)
            partial = Path(name)
            save_file({"input_ids": ids.contiguous()}, partial, {METADATA_KEY: _digest(ids)})
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            self.say(f"text cannot be kept in {self.folder} ({first_line(error)})")
            if partial is not None:
                with suppress(OSError):
                    partial.unlink()


def _digest(ids: Tensor) -> str:
    """The hash of rows, their shape included."""
    ids = ids.to(torch.int64).contiguous()
    return hashlib.sha256(f"{list(ids.shape)}".encode() + ids.numpy().tobytes()).hexdigest()
