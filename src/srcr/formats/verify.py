"""Whether what was written reads back: tensor by tensor, and through transformers."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from srcr.environment import peak_memory, release_memory, resident_memory
from srcr.errors import VerificationError
from srcr.formats import Format
from srcr.formats.checkpoint import Checkpoint, DequantizedSource
from srcr.models.checkpoint import OpenModel
from srcr.models.streaming import CastTensors, device_of, filled
from srcr.numerics.tensors import dtype_name
from srcr.records.run import Probe, Verification

#: Bytes that are nothing beside what Python with torch takes.
SMALL_MODEL = 1 << 26
#: Tokens of a probe at most.
PROBED = 32
#: How far logits may be apart by rounding, relative in norm, by the precision that weights are stored in.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 1e-1}


def verify_tensors(
    fmt: Format, checkpoint: Checkpoint, folder: Path, verified: Collection[str] = ()
) -> Checkpoint:
    """What a folder reads back to, compared: codes, dequantized weights, zeros, and every other tensor; but
    for the compressed weights that were ``verified`` before.

    Raises:
        VerificationError: names what differs.
    """
    written = fmt.read(folder)
    for name in checkpoint.contents.compressed:
        if name in verified:
            continue
        verify_weight(name, checkpoint, written, folder)
    for name in checkpoint.plain_names():
        tensor, expected = written.tensors.tensor(name), checkpoint.tensor(name)
        if not _same(tensor, expected, fmt.tolerance):
            raise VerificationError(f"{name} in {folder} does not read back as it was written")
    return written


def _same(tensor: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether a tensor is the expected one, to the bit or within a tolerance, relative to 1 and itself."""
    if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
        return False
    if not tolerance:
        return torch.equal(tensor, expected)
    tensor, expected = tensor.float(), expected.float()
    return bool(((tensor - expected).abs() <= tolerance * (1 + expected.abs())).all())


def verify_weight(name: str, checkpoint: Checkpoint, written: Checkpoint, folder: Path) -> None:
    """Compare a compressed weight with what a folder reads back to.

    Raises:
        VerificationError: it differs.
    """
    expected, dtype = checkpoint.read(name), checkpoint.dtype
    if name in written.contents.compressed:
        compressed = written.read(name)
        codes, weight = compressed.codes, compressed.dequantize()
    else:  # a format without codes
        codes, weight = expected.codes, written.weight(name)
    if not torch.equal(weight.to(dtype), expected.dequantize().to(dtype)):
        raise VerificationError(f"{name} in {folder} does not read back as it was computed")
    if expected.mask is not None and bool((weight.ne(0) & ~expected.mask).any()):
        raise VerificationError(f"pruned weights of {name} in {folder} are not zero")
    if expected.codes is not None and (codes is None or not torch.equal(codes, expected.codes)):
        raise VerificationError(f"the codes of {name} in {folder} do not read back as written")


@dataclass(frozen=True)
class Verified:
    """That logits are those of the model, and what they predict for a few tokens."""

    verification: Verification
    probe: Probe


def probe_of(ids: Tensor, logits: Tensor) -> Probe:
    """What logits [1, len, vocabulary] predict behind the first of the token ids [1, len]."""
    rows = logits[0, :PROBED].double().log_softmax(-1)
    values, tokens = rows.max(-1)
    return Probe(
        tuple(ids[0, :PROBED].tolist()),
        tuple(tokens.tolist()),
        tuple(round(value, 5) for value in values.tolist()),
    )


@dataclass(frozen=True, eq=False)
class Walked:
    """A row of token ids [1, len], and the hidden states [1, len, width] that the blocks gave for it while
    they were compressed."""

    ids: Tensor
    hidden: Tensor


def logits_fit(opened: OpenModel, running: torch.dtype) -> bool:
    """Whether transformers can load a model as large as this one, in the precision that it runs in, in no
    more memory than this process has taken already, or in very little: so what a run takes does not depend
    on how deep the model is."""
    release_memory()
    taken = peak_memory() - resident_memory(torch.device("cpu"))
    loading = 1 + running.itemsize / opened.dtype.itemsize
    return loading * opened.weight_bytes <= max(taken, SMALL_MODEL)


@torch.no_grad()
def verify_logits(
    opened: OpenModel,
    fmt: Format,
    folder: Path,
    written: Checkpoint,
    walked: Walked,
    streamed: bool = False,
) -> Verified:
    """The logits of what ``folder`` stands for beside those of the model as it was compressed: as the engine
    that serves the format loads it, or, ``streamed``, of what it reads back to (``written``), a block at a
    time.

    Raises:
        VerificationError: they differ by more than rounding explains.
    """
    running = opened.blockwise.running
    dtype = None if running == opened.dtype else running
    expected = opened.blockwise.logits(walked.ids, walked.hidden)
    if not streamed:
        logits = fmt.load(folder, dtype)(walked.ids, use_cache=False).logits
    else:
        logits = _streamed_logits(opened, written, walked.ids)
    difference = relative_difference(expected, logits)
    tolerance = TOLERANCES[opened.dtype]
    if not difference <= tolerance:
        raise VerificationError(
            f"{folder} gives other logits than the model that was compressed: their relative difference is "
            f"{difference:.2g}, and rounding explains {tolerance:g}"
        )
    verification = Verification(
        walked.ids.numel(),
        float(f"{difference:.3g}"),
        tolerance,
        "srcr, block by block" if streamed else fmt.loader(written.contents),
        dtype_name(running),
    )
    return Verified(verification, probe_of(walked.ids, expected))


@torch.no_grad()
def compare_logits(fmt: Format, folder: Path, ids: Tensor, expected: Tensor) -> Verified:
    """The logits of a folder for token ids [1, len], in float32 as the engine that serves the format loads
    it, beside the ``expected`` ones.

    Raises:
        VerificationError: they differ by more than rounding explains.
    """
    logits = fmt.load(folder, torch.float32)(ids, use_cache=False).logits
    difference, tolerance = relative_difference(expected, logits), TOLERANCES[torch.float32]
    if not difference <= tolerance:
        raise VerificationError(
            f"{folder} gives other logits than the model that was trained: their relative difference is "
            f"{difference:.2g}, and rounding explains {tolerance:g}"
        )
    loader = fmt.loader(fmt.read(folder).contents)
    verification = Verification(
        ids.numel(), float(f"{difference:.3g}"), tolerance, loader, "float32"
    )
    return Verified(verification, probe_of(ids, expected))


def relative_difference(expected: Tensor, logits: Tensor) -> float:
    """The norm of the difference, relative to that of ``expected``."""
    expected, logits = expected.double().cpu(), logits.double().cpu()
    return float((expected - logits).norm() / expected.norm().clamp_min(1e-30))


def _streamed_logits(opened: OpenModel, checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    """The logits of a checkpoint, of which a block at a time is in memory."""
    model, topology = opened.blockwise.model, opened.topology
    device = device_of(model)
    stored = DequantizedSource(checkpoint)
    weights = CastTensors(stored, opened.dtype, opened.blockwise.running, device)
    with filled(model, weights, topology.block_names(), topology.others):
        logits: Tensor = model(ids.to(device), use_cache=False).logits
    return logits
