"""evaluate(): the base and its compressed versions, in step, over the same text, tasks and prompts."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from srcr import progress
from srcr.calibration import Tokens, load_tokens
from srcr.card import labels
from srcr.compression import pick_device, versions
from srcr.errors import InputError
from srcr.files import RECORD
from srcr.metrics.divergence import Accumulator, Divergence
from srcr.metrics.rates import INCLUDES, file_bytes, measured_rates
from srcr.metrics.retention import PairedScores
from srcr.metrics.semantic import (
    Reference,
    Semantic,
    SemanticSpec,
    continue_prompts,
    load_prompts,
    prepare,
    semantic_consistency,
    semantic_json,
)
from srcr.metrics.tasks import Task, TaskResult, resolve_tasks, run_tasks
from srcr.models.load import is_quantized, load_model, load_tokenizer, resolve
from srcr.models.topology import observe
from srcr.results import Scored, divergence_json, retention_json
from srcr.types import Rates, from_dict, from_yaml, to_dict

DEFAULT_SAMPLES = 64
#: At most so many tokens, and so many logits, go through each model at a time.
BATCH_TOKENS = 4096
BATCH_LOGITS = 1 << 26


@dataclass(frozen=True)
class EvaluationText:
    """The text to compare on; by default the base writes it, from another seed stream than
    calibration's."""

    source: str = "self"
    samples: int | None = None
    seq_len: int = 512


@dataclass(frozen=True)
class TaskSpec:
    """Tasks by name ("bundled", "paper", lm-evaluation-harness names, folders), at most ``limit`` items
    of each."""

    names: tuple[str, ...]
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit {self.limit} must be at least 1 item a task")


@torch.no_grad()
def evaluate(
    base: str | Path,
    compressed: Sequence[str | Path],
    text: EvaluationText | Tokens = EvaluationText(),
    tasks: TaskSpec | None = None,
    semantic: SemanticSpec | None = None,
    seed: int = 0,
    device: str = "auto",
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """What each compressed model kept of ``base``, as design.md's JSON: rates and divergence, and where
    asked for tasks (with Sr and SrCr) and semantic consistency.

    Everything is computed in float32; the base runs once for all candidates.

    Raises:
        InputError: a model cannot be loaded, its vocabulary differs from the base's, or the text, a task
            or a scorer cannot be used.
    """
    started = time.monotonic()
    where = pick_device(device)
    if not compressed:
        raise InputError("no compressed model was given")
    chosen = resolve_tasks(tasks.names) if tasks else None
    base_folder = resolve(base)
    folders = [resolve(path) for path in compressed]
    names = labels([str(name) for name in compressed])
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("a compressed model was given twice: name each once")
    reference = load_model(base_folder, torch.float32).to(where)
    tokenizer = load_tokenizer(base_folder)
    if tasks is not None and tokenizer is None:
        raise InputError(f"tasks are text, but {base} has no tokenizer: measure without --tasks")
    models, rates, records = [], [], [_record(folder) for folder in folders]
    for name, folder, record in zip(compressed, folders, records, strict=True):
        model = load_model(folder)
        _check_vocabulary(str(base), reference, tokenizer, str(name), folder, model)
        rates.append(_rates(base_folder, folder, record, model, reference))
        models.append(model.to(device=where, dtype=torch.float32))
    tokens = _text(text, reference, tokenizer, seed, quiet)
    rows = set(tokens.rows())
    for folder, record in zip(folders, records, strict=True):
        if rows.intersection(record.get("calibration", {}).get("rows", [])):
            progress.console().print(f"warning: {folder} was calibrated on some of this text")
    meaning = None
    if semantic is not None:
        meaning = _continued(semantic, text.source, reference, tokenizer, seed, quiet)
    divergences = _divergences(reference, models, names, tokens, quiet)
    scored = None
    if tasks is not None and chosen is not None:
        scored = _scores(chosen, reference, models, names, tokenizer, tasks.limit, seed, quiet)
    meanings = None if meaning is None else _meanings(meaning, models, names, quiet)
    shared = {
        "text": {k: v for k, v in tokens.record().items() if k != "rows"},
        "includes": INCLUDES,
        "versions": versions(),
        "seconds": round(time.monotonic() - started, 3),
    }
    return [
        {
            "base": str(base),
            "compressed": str(name),
            "plan_fingerprint": records[i].get("plan_fingerprint"),
            "rates": to_dict(rates[i]),
            "divergence": divergence_json(divergences[i]),
            "semantic": meanings and semantic_json(meanings[i]),
            **retention_json(scored[i] if scored else {}, rates[i]),
            **shared,
        }
        for i, name in enumerate(compressed)
    ]


def _check_vocabulary(
    base: str, reference: Any, tokenizer: Any, name: str, folder: Path, model: Any
) -> None:
    """Two models can be compared only if an id means the same to both."""
    ours = model.get_input_embeddings().weight.shape[0]
    theirs = reference.get_input_embeddings().weight.shape[0]
    if ours != theirs:
        raise InputError(
            f"{name} has a vocabulary of {ours}, the base {base} one of {theirs}: they are not versions of "
            "the same model"
        )
    if tokenizer is not None and len(tokenizer) > theirs:
        raise InputError(
            f"the tokenizer of {base} has {len(tokenizer)} tokens, its model only {theirs}: they do not "
            "belong together"
        )
    other = load_tokenizer(folder)
    if tokenizer is not None and other is not None and other.get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"{name} and the base {base} have different tokenizers: an id does not mean the same to both"
        )


def _text(
    text: EvaluationText | Tokens, reference: Any, tokenizer: Any, seed: int, quiet: bool
) -> Tokens:
    if isinstance(text, Tokens):
        return text
    with progress.stage("text", 1, quiet) as bar:
        tokens = load_tokens(
            text.source, reference, tokenizer, text.samples, text.seq_len, seed,
            "evaluation", DEFAULT_SAMPLES,
            lambda done, total: bar.reach(done / total, f"{text.source}: {done} tokens"),
        )  # fmt: skip
        bar.reach(1, f"{text.source}: {' x '.join(map(str, tokens.input_ids.shape))} tokens")
    if len(tokens.input_ids) < 2:
        raise InputError("one sequence gives no interval: evaluate on at least 2 (--samples)")
    return tokens


def _divergences(
    reference: Any, models: Sequence[Any], names: Sequence[str], tokens: Tokens, quiet: bool
) -> list[Divergence]:
    """All models over the text, batch by batch: the base's logits of a batch serve every candidate."""
    totals = [Accumulator() for _ in models]
    vocabulary = reference.get_input_embeddings().weight.shape[0]
    size = min(BATCH_TOKENS, BATCH_LOGITS // vocabulary) // tokens.input_ids.shape[1]
    batches = torch.split(tokens.input_ids, max(1, size))
    with progress.stage("evaluate", len(batches) * (1 + len(models)), quiet) as bar:
        for ids in batches:
            ids = ids.to(reference.device)
            expected = reference(ids, use_cache=False).logits
            bar.note("base", advance=1)
            for total, model, name in zip(totals, models, names, strict=True):
                total.add(expected, model(ids, use_cache=False).logits, ids)
                bar.note(name, advance=1)
    return [total.result() for total in totals]


def _continued(
    spec: SemanticSpec, source: str, reference: Any, tokenizer: Any, seed: int, quiet: bool
) -> Reference:
    """The prompts, and what the base makes of them."""
    with progress.stage("semantic", 2, quiet) as bar:

        def watch(start: int, name: str) -> Callable[[int, int], None]:
            return lambda done, total: bar.reach(start + done / total, name)

        prompts = load_prompts(spec, source, reference, tokenizer, seed, watch(0, "prompts"))
        theirs = prepare(reference, tokenizer, prompts, spec, watch(1, "base"))
        bar.reach(2, f"base, to be scored by {theirs.scorer.name}")
    return theirs


def _meanings(
    theirs: Reference, models: Sequence[Any], names: Sequence[str], quiet: bool
) -> list[Semantic]:
    """What every candidate makes of the same prompts, compared."""
    found = []
    with progress.stage("semantic", len(models), quiet) as bar:
        for i, (name, model) in enumerate(zip(names, models, strict=True)):

            def watch(done: int, total: int, i: int = i, name: str = name) -> None:
                bar.reach(i + done / total, name)

            found.append(semantic_consistency(theirs, continue_prompts(theirs, model, watch)))
            bar.reach(i + 1, name)
    return found


def _record(folder: Path) -> dict[str, Any]:
    """``srcr.json``, which newer or older versions may have written; empty where there is none."""
    path = folder / RECORD
    if not path.is_file():
        return {}
    data = from_yaml(dict, path)  # JSON is YAML
    if not isinstance(data.get("rates"), dict):
        raise InputError(f"{path} has no 'rates': it was not written by srcr compress")
    return data


def _rates(base: Path, folder: Path, record: dict[str, Any], model: Any, reference: Any) -> Rates:
    """From the record where there is one (bytes counted anew), else from config and weights."""
    if not record:
        linears = observe(reference).shapes.values()
        parameters = sum(height * width for height, width in linears)
        return measured_rates(base, folder, model, observe(model), parameters)
    return from_dict(
        Rates,
        record["rates"] | {"base_bytes": file_bytes(base), "stored_bytes": file_bytes(folder)},
        where=str(folder / RECORD),
    )


def _scores(
    chosen: Sequence[Task], reference: Any, models: Sequence[Any], names: Sequence[str], tokenizer: Any,
    limit: int | None, seed: int, quiet: bool,
) -> list[dict[str, Scored]]:  # fmt: skip
    """Every task on the base, once, and on every candidate."""
    found: list[dict[str, TaskResult]] = []
    with progress.stage("tasks", 1 + len(models), quiet) as bar:
        for i, (name, model) in enumerate(zip(["base", *names], [reference, *models], strict=True)):

            def watch(done: float, what: str, i: int = i, name: str = name) -> None:
                bar.reach(i + done / len(chosen), f"{name}: {what}")

            found.append(run_tasks(chosen, model, tokenizer, limit, seed, watch))
            bar.reach(i + 1, name)
    base, *others = found
    return [
        {
            name: Scored(
                result.metric,
                PairedScores(
                    np.array(result.correct, dtype=np.float64),
                    np.array(other[name].correct, dtype=np.float64),
                    result.chance,
                ),
            )
            for name, result in base.items()
        }
        for other in others
    ]


def inspect(model: str | Path) -> dict[str, Any]:
    """What srcr sees in a model: blocks, linears, which share an input, parameters and bytes.

    Raises:
        InputError: the model cannot be loaded, or srcr cannot handle its architecture.
    """
    folder = resolve(model)
    loaded = load_model(folder)
    topology = observe(loaded)
    linear = sum(height * width for height, width in topology.shapes.values())
    return {
        "model": str(model),
        "architecture": type(loaded).__name__,
        "dtype": str(next(loaded.parameters()).dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in loaded.parameters()),
        "linear_parameters": linear,
        "base_bytes": file_bytes(folder),
        "output_head": topology.head,
        "tied_embeddings": topology.tied,
        "quantized": is_quantized(folder),
        "blocks": [
            {
                "name": block.name,
                "units": [
                    {
                        "linears": [f"{block.name}.{name}" for name in unit.names],
                        "shapes": [
                            list(topology.shapes[f"{block.name}.{name}"]) for name in unit.names
                        ],
                    }
                    for unit in block.units
                ],
            }
            for block in topology.blocks
        ],
    }
