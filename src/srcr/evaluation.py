"""evaluate(): the base and its compressed versions, in step, over the same text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from srcr import progress
from srcr.calibration import load_tokens
from srcr.compression import pick_device
from srcr.errors import InputError
from srcr.formats.checkpoint import RECORD
from srcr.metrics.divergence import Accumulator, Divergence
from srcr.metrics.rates import file_bytes, measured_rates
from srcr.models.load import load_model, load_tokenizer, read_config, resolve
from srcr.models.topology import observe
from srcr.types import Estimate, Rates, from_dict, from_yaml, to_dict

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


@torch.no_grad()
def evaluate(
    base: str | Path,
    compressed: Sequence[str | Path],
    text: EvaluationText = EvaluationText(),
    seed: int = 0,
    device: str = "auto",
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Rates and divergence of each compressed model against ``base``, as design.md's JSON.

    Everything is computed in float32; the base runs once for all candidates, batch by batch.

    Raises:
        InputError: a model cannot be loaded, its vocabulary differs from the base's, or the text
            cannot be used.
    """
    where = pick_device(device)
    base_folder = resolve(base)
    folders = [resolve(path) for path in compressed]
    if not folders:
        raise InputError("no compressed model was given")
    reference = load_model(base_folder, torch.float32).to(where)
    vocabulary = reference.get_input_embeddings().weight.shape[0]
    models = []
    rates = []
    for name, folder in zip(compressed, folders, strict=True):
        model = load_model(folder)
        size = model.get_input_embeddings().weight.shape[0]
        if size != vocabulary:
            raise InputError(
                f"{name} has a vocabulary of {size}, the base {base} one of {vocabulary}: they are not "
                "versions of the same model"
            )
        rates.append(_rates(base_folder, folder, model))
        models.append(model.to(device=where, dtype=torch.float32))
    with progress.stage("text", 1, quiet) as bar:
        tokens = load_tokens(
            text.source, reference, load_tokenizer(base_folder), text.samples, text.seq_len, seed,
            "evaluation", DEFAULT_SAMPLES,
            lambda done, total: bar.reach(done / total, f"{text.source}: {done} tokens"),
        )  # fmt: skip
        bar.reach(1, f"{text.source}: {' x '.join(map(str, tokens.input_ids.shape))} tokens")
    if len(tokens.input_ids) < 2:
        raise InputError("one sequence gives no interval: evaluate on at least 2 (--samples)")
    for folder in _calibrated_on(tokens.rows(), folders):
        progress.console().print(f"warning: {folder} was calibrated on some of this text")
    totals = [Accumulator() for _ in models]
    size = min(BATCH_TOKENS, BATCH_LOGITS // vocabulary) // tokens.input_ids.shape[1]
    batches = torch.split(tokens.input_ids, max(1, size))
    with progress.stage("evaluate", len(batches) * (1 + len(models)), quiet) as bar:
        for ids in batches:
            ids = ids.to(where)
            expected = reference(ids, use_cache=False).logits
            bar.note("base", advance=1)
            for total, model, name in zip(totals, models, compressed, strict=True):
                total.add(expected, model(ids, use_cache=False).logits, ids)
                bar.note(Path(name).name, advance=1)
    return [
        {
            "base": str(base),
            "compressed": str(name),
            "rates": to_dict(rate),
            "divergence": _divergence_json(total.result()),
            "semantic": None,
            "tasks": {},
            "sr": None,
            "srcr": None,
            "text": {k: v for k, v in tokens.record().items() if k != "rows"},
        }
        for name, rate, total in zip(compressed, rates, totals, strict=True)
    ]


def _rates(base: Path, folder: Path, model: Any) -> Rates:
    """From ``srcr.json`` where there is one (bytes counted anew), else from config and weights."""
    record = folder / RECORD
    if not record.is_file():
        return measured_rates(base, folder, model, observe(model))
    data = from_yaml(dict, record)  # JSON is YAML
    if not isinstance(data.get("rates"), dict):
        raise InputError(f"{record} has no 'rates': it was not written by srcr compress")
    return from_dict(
        Rates,
        data["rates"] | {"base_bytes": file_bytes(base), "stored_bytes": file_bytes(folder)},
        where=str(record),
    )


def _calibrated_on(rows: list[str], folders: Sequence[Path]) -> list[Path]:
    """The models that were calibrated on some of these sequences: measuring there flatters them."""
    found = []
    for folder in folders:
        record = folder / RECORD
        if record.is_file():
            used = from_yaml(dict, record).get("calibration", {}).get("rows", [])
            if set(rows).intersection(used):
                found.append(folder)
    return found


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "ci95": [estimate.low, estimate.high]}


def _divergence_json(divergence: Divergence) -> dict[str, Any]:
    return {
        "kl": _estimate(divergence.kl) | {"p99": divergence.kl_p99},
        "top1_agreement": _estimate(divergence.top1_agreement),
        "perplexity": {"base": divergence.base_perplexity, "compressed": divergence.perplexity},
        "n_tokens": divergence.n_tokens,
    }


def inspect(model: str | Path) -> dict[str, Any]:
    """What srcr sees in a model: blocks, linears, which share an input, parameters and bytes.

    Raises:
        InputError: the model cannot be loaded, or srcr cannot handle its architecture.
    """
    folder = resolve(model)
    config = read_config(folder)
    loaded = load_model(folder)
    topology = observe(loaded)
    linear = sum(height * width for height, width in topology.shapes.values())
    return {
        "model": str(model),
        "architecture": (config.get("architectures") or [type(loaded).__name__])[0],
        "dtype": str(next(loaded.parameters()).dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in loaded.parameters()),
        "linear_parameters": linear,
        "base_bytes": file_bytes(folder),
        "output_head": topology.head,
        "tied_embeddings": topology.tied,
        "quantized": "quantization_config" in config,
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
