"""verify(): whether the engines that run here compute from a checkpoint what it stands for."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from srcr.engines import Engine, engines, get_engine
from srcr.errors import InputError, first_line
from srcr.formats import Format, detect
from srcr.formats.verify import TOLERANCES, relative_difference
from srcr.models.load import resolve
from srcr.pipelines.options import RunOptions
from srcr.pipelines.progress import stage
from srcr.records.run import Probe, RunRecord
from srcr.records.verification import EngineCheck, Outcome, VerificationResult
from srcr.serialize import from_yaml
from srcr.storage.layout import RECORD

#: Tokens that engines are asked for where no record says which.
TOKENS = 32
#: How the run that wrote a checkpoint is called among the engines.
RECORDED = "srcr, when it was written"


@torch.no_grad()
def verify(
    model: str | Path, names: Sequence[str] | None = None, options: RunOptions = RunOptions()
) -> VerificationResult:
    """What the engines called ``names`` (None: all) say of the compressed model in a folder (or hub id): each
    loads it by itself, and its logits are compared with those of the weights that srcr reads from the files;
    so are the predictions that were recorded when the model was written. The model is loaded whole, in
    float32.

    Raises:
        InputError: it is no checkpoint that srcr reads, or an engine is not known.

    >>> verify("small", ["transformers"]).passed
    True
    """
    folder = resolve(model)
    chosen = [get_engine(name) for name in names] if names is not None else [*engines().values()]
    fmt = detect(folder)
    probe = _recorded(folder)
    with stage("verify", 1 + len(chosen), options.quiet) as bar:
        bar.note("srcr")
        checkpoint = fmt.read(folder)
        loaded = checkpoint.dequantized(torch.float32)
        size = loaded.get_input_embeddings().weight.shape[0]
        ids = torch.arange(TOKENS)[None] % size if probe is None else torch.tensor([probe.ids])
        expected = loaded(ids, use_cache=False).logits
        del loaded
        tolerance = TOLERANCES[checkpoint.dtype]
        checks = [] if probe is None else [_compare_recorded(expected, probe, tolerance, folder)]
        for engine in chosen:
            bar.note(engine.name, advance=1)
            checks.append(_ask(engine, fmt, folder, ids, expected))
        bar.note("done", advance=1)
    return VerificationResult(str(model), fmt.name, ids.numel(), tuple(checks))


def _recorded(folder: Path) -> Probe | None:
    """What was predicted when the checkpoint was written, where that is known."""
    if not (folder / RECORD).is_file():
        return None
    return from_yaml(RunRecord, folder / RECORD).probe


def _compare_recorded(
    expected: Tensor, probe: Probe, tolerance: float, folder: Path
) -> EngineCheck:
    """How far log-probabilities are from the recorded ones, on average."""
    size = expected.shape[-1]
    if max(probe.top1, default=0) >= size:
        raise InputError(f"{folder / RECORD} speaks of another vocabulary than the weights have")
    rows = expected[0].double().log_softmax(-1)
    top1 = torch.tensor(probe.top1)
    given = rows.gather(1, top1[:, None])[:, 0]
    wanted = torch.tensor(probe.log_probabilities, dtype=torch.float64)
    difference = float((given - wanted).abs().mean())
    agreement = float((rows.argmax(-1) == top1).double().mean())
    outcome: Outcome = "agrees" if difference <= tolerance else "differs"
    return EngineCheck(RECORDED, outcome, None, difference, tolerance, agreement)


def _ask(engine: Engine, fmt: Format, folder: Path, ids: Tensor, expected: Tensor) -> EngineCheck:
    if not engine.reads(fmt.name):
        return EngineCheck(engine.name, "skipped", f"it does not read {fmt.name}")
    if (reason := engine.unavailable()) is not None:
        return EngineCheck(engine.name, "skipped", reason)
    try:
        logits = engine.logits(folder, ids)
    except Exception as error:  # an engine is somebody else's: whatever it raises, it fails
        return EngineCheck(engine.name, "fails", first_line(error))
    if logits.shape != expected.shape:
        shapes = f"{list(logits.shape)} instead of {list(expected.shape)}"
        return EngineCheck(engine.name, "fails", f"it gives logits of shape {shapes}")
    ours, theirs = (each.double().log_softmax(-1) for each in (expected, logits))
    difference = relative_difference(ours, theirs)
    agreement = float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
    outcome: Outcome = "agrees" if difference <= engine.tolerance else "differs"
    return EngineCheck(engine.name, outcome, None, difference, engine.tolerance, agreement)
