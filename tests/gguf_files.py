"""GGUF files of tiny models, and how near what llama.cpp computes of them is to transformers."""

import pytest
import torch

import srcr
from srcr.formats import get_format
from srcr.testing.checkpoints import compressed_checkpoint

FORMAT = get_format("gguf")
#: What rounding activations to 8 bits does to logits, relative in norm; and keeping the cache in float16.
ROUNDED, EXACT = 3e-2, 3e-3
IDS = torch.arange(3, 45)[None] * 7 % 96


def needs_llama():
    """Skip the test where llama.cpp does not run."""
    reason = _engine().unavailable()
    if reason is not None:
        pytest.skip(reason)


def written(model, recipe, folder):
    """A model compressed and written as GGUF; its checkpoint."""
    checkpoint = compressed_checkpoint(model, recipe, FORMAT)
    FORMAT.check(checkpoint.contents)
    folder.mkdir()
    FORMAT.write(checkpoint, folder)
    return checkpoint


@torch.no_grad()
def differences(folder, checkpoint, ids=IDS):
    """Of logits from those of transformers, relative in norm: llama.cpp's and those of srcr.load."""
    expected = checkpoint.dequantized(torch.float32)(ids, use_cache=False).logits
    loaded = srcr.load(folder, torch.float32)(ids, use_cache=False).logits
    given = _engine().logits(folder, ids)
    return [float((each - expected).norm() / expected.norm()) for each in (given, loaded)]


def _engine():
    return pytest.importorskip("srcr.engines.llama_cpp").ENGINE
