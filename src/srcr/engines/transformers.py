"""transformers, as a user loads a folder with it: without srcr."""

from pathlib import Path

import torch
from torch import Tensor

from srcr.engines import Engine
from srcr.models.load import load_model


@torch.no_grad()
def _logits(folder: Path, ids: Tensor) -> Tensor:
    logits: Tensor = load_model(folder, torch.float32)(ids, use_cache=False).logits
    return logits


ENGINE = Engine(
    name="transformers",
    unavailable=lambda: None,
    logits=_logits,
    reads=lambda format_name: format_name in ("compressed-tensors", "dense"),
    tolerance=1e-3,
)
