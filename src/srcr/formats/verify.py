"""Whether what was written reads back: tensor by tensor, and through transformers."""

from pathlib import Path

import torch
from torch import Tensor

from srcr.environment import peak_memory, release_memory, resident_memory
from srcr.errors import VerificationError
from srcr.formats import Format
from srcr.formats.checkpoint import Checkpoint
from srcr.models.checkpoint import OpenModel
from srcr.models.streaming import filled

#: What loading a model through transformers takes, as a multiple of the original's files.
LOADING = 2
#: Bytes that are nothing beside what Python with torch takes.
SMALL_MODEL = 1 << 26
#: How far logits may be apart, relative and absolute.
TOLERANCE = 1e-3


def verify_tensors(fmt: Format, checkpoint: Checkpoint, folder: Path) -> None:
    """Read a folder back: codes, dequantized weights, zeros, and every other tensor.

    Raises:
        VerificationError: names what differs.
    """
    written = fmt.read(folder)
    for name in checkpoint.contents.compressed:
        _verify_weight(name, checkpoint, written, folder)
    for name in checkpoint.plain_names():
        if not torch.equal(written.tensors.tensor(name), checkpoint.tensor(name)):
            raise VerificationError(f"{name} in {folder} does not read back as it was written")


def _verify_weight(name: str, checkpoint: Checkpoint, written: Checkpoint, folder: Path) -> None:
    expected, dtype = checkpoint.read(name), checkpoint.dtype
    if name in written.contents.compressed:
        compressed = written.read(name)
        codes, weight = compressed.codes, compressed.dequantize()
    else:  # a format without codes
        codes, weight = expected.codes, written.weight(name)
    if not torch.equal(weight.to(dtype), expected.dequantize().to(dtype)):
        raise VerificationError(f"{name} in {folder} does not read back as it was computed")
    if expected.mask is not None and bool((weight[~expected.mask] != 0).any()):
        raise VerificationError(f"pruned weights of {name} in {folder} are not zero")
    if expected.codes is not None and (codes is None or not torch.equal(codes, expected.codes)):
        raise VerificationError(f"the codes of {name} in {folder} do not read back as written")


def logits_fit(opened: OpenModel) -> bool:
    """Whether transformers can load a model as large as this one in no more memory than this process has
    taken already, or in very little: so what a run takes does not depend on how deep the model is."""
    release_memory()
    taken = peak_memory() - resident_memory(torch.device("cpu"))
    return LOADING * opened.weight_bytes <= max(taken, SMALL_MODEL)


class _Weights:
    """The tensors of a checkpoint by the names of the model's parameters."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def get(self, name: str) -> Tensor:
        """A tensor, in the model's precision."""
        return self._checkpoint.tensor(name)


@torch.no_grad()
def verify_logits(opened: OpenModel, fmt: Format, folder: Path) -> None:
    """The model with the weights that ``folder`` stands for, a module's at a time, against what the engine
    that loads the format gives.

    Raises:
        VerificationError: the logits differ.
    """
    model = opened.blockwise.model
    tokens = ((torch.arange(16) * 5 + 1) % opened.vocabulary)[None]
    with filled(model, _Weights(fmt.read(folder))):
        expected = model(tokens, use_cache=False).logits.float()
    logits = fmt.load(folder, None)(tokens, use_cache=False).logits.float()
    if not torch.allclose(expected, logits, rtol=TOLERANCE, atol=TOLERANCE):
        worst = float((expected - logits).abs().max())
        raise VerificationError(
            f"transformers loads {folder} to other logits (largest difference {worst:.3g})"
        )
