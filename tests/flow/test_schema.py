"""The JSON that commands print and write has the keys of the design, and no others."""

import json

import jsonschema
import pytest
import torch
from safetensors.torch import save_file

from srcr.testing import save_tiny_model

NUMBER, COUNT, TEXT = {"type": "number"}, {"type": "integer"}, {"type": "string"}
FLAG = {"type": "boolean"}


def record(required, optional=()):
    """An object with exactly these keys."""
    return {
        "type": "object",
        "properties": {**required, **dict(optional)},
        "required": list(required),
        "additionalProperties": False,
    }


def items_of(schema, n=None):
    size = {} if n is None else {"minItems": n, "maxItems": n}
    return {"type": "array", "items": schema, **size}


def by_name(schema):
    return {"type": "object", "additionalProperties": schema}


def nullable(schema):
    return {"anyOf": [schema, {"type": "null"}]}


CI95 = items_of(NUMBER, 2)
ESTIMATE = record({"value": NUMBER, "ci95": CI95})
RATES = record({
    "sparsity": NUMBER, "bits": NUMBER, "tcr": NUMBER, "zeros": NUMBER, "base_bytes": COUNT,
    "stored_bytes": COUNT, "loaded_bytes": COUNT, "engine": TEXT, "source": TEXT,
}, {"entropy_bits": NUMBER})  # fmt: skip
SOURCE = record({"source": TEXT, "samples": COUNT, "seq_len": COUNT, "sha256": TEXT},
                {"rows": items_of(TEXT)})  # fmt: skip
KL = record({"value": NUMBER, "ci95": CI95, "p50": NUMBER, "p95": NUMBER, "p99": NUMBER,
             "p999": NUMBER})  # fmt: skip
DIVERGENCE = record({
    "kl": KL, "top1_agreement": ESTIMATE, "flips": ESTIMATE, "n_tokens": COUNT,
    "perplexity": record({"base": NUMBER, "compressed": NUMBER, "ratio": ESTIMATE}),
})  # fmt: skip
WORST = record({"prompt": TEXT, "base": TEXT, "compressed": TEXT, "similarity": NUMBER})
SEMANTIC = record({
    "consistency": NUMBER, "ci95": CI95, "chance": NUMBER, "normalised": nullable(NUMBER),
    "normalised_ci95": nullable(CI95), "scorer": TEXT, "n": COUNT, "prompt_len": COUNT,
    "max_new_tokens": COUNT, "exact": NUMBER, "worst": items_of(WORST), "source": TEXT,
})  # fmt: skip
TASK = record({
    "base": NUMBER, "compressed": NUMBER, "chance": NUMBER, "n": COUNT, "retention": nullable(NUMBER),
    "ci95": nullable(CI95), "p_value": NUMBER, "flips": NUMBER, "metric": TEXT,
}, {"note": TEXT})  # fmt: skip
EVALUATION = record({
    "base": TEXT, "compressed": TEXT, "plan_fingerprint": nullable(TEXT), "rates": RATES,
    "divergence": DIVERGENCE, "semantic": nullable(SEMANTIC), "tasks": by_name(TASK),
    "sr": nullable(NUMBER), "sr_ci95": nullable(CI95), "srcr": nullable(NUMBER),
    "srcr_ci95": nullable(CI95),
    "items": by_name(record({"base": items_of(NUMBER), "compressed": items_of(NUMBER)})),
    "text": SOURCE, "includes": by_name(TEXT), "versions": by_name(TEXT), "seconds": NUMBER,
    "command": TEXT,
}, {"plan": {"type": "object"}})  # fmt: skip
LAYER = record({
    "name": TEXT, "shape": items_of(COUNT, 2), "sparsity": NUMBER, "bits": COUNT, "tcr": NUMBER,
    "zeros": NUMBER, "entropy_bits": NUMBER, "error": NUMBER,
})  # fmt: skip
RUN = record({
    "base": TEXT, "base_sha256": TEXT, "command": TEXT, "format": TEXT, "rates": RATES,
    "plan_fingerprint": TEXT, "calibration": SOURCE, "layers": items_of(LAYER),
    "versions": by_name(TEXT), "seconds": NUMBER, "peak_memory_bytes": COUNT,
    "notes": items_of(TEXT),
}, {"out": TEXT})  # fmt: skip
PRUNE = record({"method": TEXT, "sparsity": NUMBER, "mask_structure": TEXT})
QUANT = record({"method": TEXT, "num_bits": COUNT, "group_size": {"type": ["integer", "string"]},
                "symmetric": FLAG}, {"actorder": nullable(TEXT)})  # fmt: skip
SOLVER = record({"mode": TEXT, "dampening_frac": NUMBER, "block_size": COUNT, "dense_targets": FLAG,
                 "descent_rounds": COUNT}, {"dense_share": NUMBER})  # fmt: skip
LOSS = record({"sparsity": NUMBER, "num_bits": COUNT, "error": NUMBER}, {"kl": NUMBER})
TABLE = record({
    "base": TEXT, "base_sha256": TEXT, "calibration": SOURCE,
    "groups": items_of(record({"names": items_of(TEXT), "size": COUNT, "losses": items_of(LOSS)})),
    "prune": PRUNE, "quant": QUANT, "solver": SOLVER, "seconds": NUMBER,
}, {"text": SOURCE})  # fmt: skip
TARGET = record({}, {"tcr": NUMBER, "stored_bytes": COUNT, "loaded_bytes": COUNT})
OBJECTIVE = record({"measure": TEXT, "tasks_of_sr": items_of(TEXT)}, {"limit": COUNT})
SEARCH = record({
    "model": TEXT, "target": TARGET, "command": TEXT, "trials": COUNT, "seconds": NUMBER,
    "groups": items_of(items_of(TEXT)), "sensitivity": TABLE,
    "measured": items_of(record({"kl": NUMBER, "complete": FLAG,
                                 "levels": items_of(nullable(TEXT))})),
    "chosen": TEXT, "objective": OBJECTIVE,
    "choice": by_name(record({"kl": {"type": "object"}, "value": nullable(NUMBER)})),
    "finalists": items_of(EVALUATION), "fingerprint": TEXT, "settings": by_name(TEXT),
}, {"out": TEXT})  # fmt: skip
INSPECTION = record({
    "model": TEXT, "architecture": TEXT, "dtype": TEXT, "parameters": COUNT,
    "linear_parameters": COUNT, "base_bytes": COUNT, "output_head": nullable(TEXT),
    "tied_embeddings": FLAG, "quantized": FLAG,
    "blocks": items_of(record({"name": TEXT, "units": items_of(
        record({"linears": items_of(TEXT), "shapes": items_of(items_of(COUNT, 2))}))})),
})  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model and token ids."""
    folder = tmp_path_factory.mktemp("schema")
    save_tiny_model(folder / "tiny", "llama")
    ids = torch.randint(0, 96, (48, 32), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, folder / "ids.safetensors")
    return folder


def check(data, schema):
    jsonschema.Draft202012Validator(schema).validate(data)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_compression(srcr, place):
    options = ["--calibration", place / "ids.safetensors", "--sparsity", 0.25, "--json"]
    result = srcr("compress", place / "tiny", "-o", place / "small", *options)
    check(result.json(), RUN)
    assert result.json()["out"] == str(place / "small")
    check(read(place / "small/srcr.json"), RUN)
    exported = srcr("export", place / "small", "--format", "dense", "-o", place / "d", "--json")
    check(exported.json(), RUN)
    evaluated = srcr("evaluate", place / "tiny", place / "small", "--text", place / "ids.safetensors",
                     "--semantic", "--prompts", 8, "--prompt-len", 8, "--report", "--json")  # fmt: skip
    check(evaluated.json(), EVALUATION)
    check(read(place / "small/evaluation.json"), EVALUATION)


def test_tasks(srcr, tmp_path):
    options = ["--text", "bundled", "--samples", 2, "--seq-len", 32, "--tasks", "bundled"]
    result = srcr("evaluate", "bundled", "bundled", *options, "--limit", 5, "--json")
    assert result.code == 0, result.err
    check(result.json(), EVALUATION)
    assert result.json()["tasks"]
    assert result.json()["items"]


def test_a_table_and_a_search(srcr, place):
    options = ["--calibration", place / "ids.safetensors", "--samples", 16, "--sparsities", "0,0.5",
               "--widths", "3,4"]  # fmt: skip
    result = srcr("sensitivity", place / "tiny", "-o", place / "table.json", *options, "--json")
    check(result.json(), TABLE)
    assert result.json() == read(place / "table.json")
    target = ["--target", "tcr=0.8", "--trials", 4]
    result = srcr("search", place / "tiny", "-o", place / "best", *target, *options, "--json")
    assert result.code == 0, result.err
    check(result.json(), SEARCH)
    check(read(place / "best/search.json"), SEARCH)
    check(read(place / "best/evaluation.json"), EVALUATION)


def test_an_inspection(srcr, place):
    check(srcr("inspect", place / "tiny", "--json").json(), INSPECTION)


@pytest.mark.parametrize("key", ["rates", "divergence", "sr", "text"])
def test_a_key_that_is_renamed_is_noticed(place, key):
    data = read(place / "small/evaluation.json")
    data[f"{key}_"] = data.pop(key)
    with pytest.raises(jsonschema.ValidationError):
        check(data, EVALUATION)
