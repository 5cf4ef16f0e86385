"""The JSON of design section 8 as schemas: objects with exactly these keys, printed or written."""

import copy

import jsonschema

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


PRUNE = record({"method": TEXT, "sparsity": NUMBER, "mask_structure": TEXT})
QUANT = record({"method": TEXT, "num_bits": COUNT, "group_size": {"type": ["integer", "string"]},
                "symmetric": FLAG}, {"actorder": nullable(TEXT)})  # fmt: skip
SOLVER = record({"mode": TEXT, "dampening_frac": NUMBER, "block_size": COUNT, "dense_targets": FLAG,
                 "descent_rounds": COUNT}, {"dense_share": NUMBER})  # fmt: skip
TARGET = record({}, {"tcr": NUMBER, "stored_bytes": COUNT, "loaded_bytes": COUNT})
LAYER_PLAN = record({"name": TEXT}, {"prune": PRUNE, "quant": QUANT})
PLAN = record({
    "layers": items_of(LAYER_PLAN), "seed": COUNT, "solver": SOLVER,
}, {"target": TARGET, "embeddings": items_of(LAYER_PLAN)})  # fmt: skip
CI95 = items_of(NUMBER, 2)
ESTIMATE = record({"value": NUMBER, "ci95": CI95})
RATES = record({
    "sparsity": NUMBER, "bits": NUMBER, "tcr": NUMBER, "zeros": NUMBER, "base_bytes": COUNT,
    "stored_bytes": COUNT, "loaded_bytes": COUNT, "engine": TEXT, "source": TEXT,
}, {"entropy_bits": NUMBER})  # fmt: skip
SOURCE = record({"source": TEXT, "samples": COUNT, "seq_len": COUNT, "sha256": TEXT, "tokens": COUNT,
                 "prefix": items_of(COUNT)}, {"rows": items_of(TEXT)})  # fmt: skip
KL = record({"value": NUMBER, "ci95": CI95, "p50": NUMBER, "p95": NUMBER, "p99": NUMBER,
             "p999": NUMBER},
            {"histogram": record({"edges": items_of(NUMBER), "counts": items_of(COUNT)})})  # fmt: skip
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
    "text": SOURCE, "dtype": TEXT, "includes": by_name(TEXT), "versions": by_name(TEXT), "seconds": NUMBER,
    "command": TEXT,
}, {"plan": PLAN})  # fmt: skip
LAYER = record({
    "name": TEXT, "shape": items_of(COUNT, 2), "sparsity": NUMBER, "bits": COUNT, "tcr": NUMBER,
    "zeros": NUMBER, "entropy_bits": NUMBER, "error": NUMBER,
})  # fmt: skip
VERIFICATION = record({
    "tokens": COUNT, "difference": NUMBER, "tolerance": NUMBER, "loaded_by": TEXT, "precision": TEXT,
})  # fmt: skip
PROBE = record({
    "ids": items_of(COUNT), "top1": items_of(COUNT), "log_probabilities": items_of(NUMBER),
})  # fmt: skip
CHECK = record(
    {"engine": TEXT, "outcome": TEXT},
    {"reason": TEXT, "difference": NUMBER, "tolerance": NUMBER, "top1_agreement": NUMBER},
)
VERIFICATION_RESULT = record({
    "folder": TEXT, "format": TEXT, "tokens": COUNT, "checks": items_of(CHECK),
})  # fmt: skip
STRUCTURE = record(
    {"kind": TEXT, "before": COUNT, "after": COUNT},
    {"removed": items_of(COUNT), "folded": FLAG, "errors": items_of(NUMBER)},
)
RECOVERY_SPEC = record(
    {
        "stage": TEXT, "batch": COUNT, "train": TEXT, "loss": TEXT, "lr": NUMBER, "value_lr": NUMBER,
        "scale_lr": NUMBER, "plain_lr": NUMBER, "block_steps": COUNT,
    },
    {"steps": COUNT, "minutes": NUMBER},
)  # fmt: skip
LOOK = record({"step": COUNT, "loss": nullable(NUMBER), "kl": NUMBER, "seconds": NUMBER})
RECOVERY = record({
    "spec": RECOVERY_SPEC, "source": nullable(TEXT), "text": SOURCE, "held_out": SOURCE, "steps": COUNT,
    "best_step": COUNT, "tokens": COUNT, "seconds": NUMBER, "before": ESTIMATE, "after": ESTIMATE,
    "change": ESTIMATE, "accepted": FLAG, "curve": items_of(LOOK),
}, {"stopped": TEXT, "blocks": items_of(FLAG), "fingerprint": TEXT})  # fmt: skip
RUN = record({
    "base": TEXT, "base_sha256": TEXT, "command": TEXT, "format": TEXT, "rates": RATES,
    "plan_fingerprint": TEXT, "calibration": SOURCE, "layers": items_of(LAYER),
    "versions": by_name(TEXT), "seconds": NUMBER, "peak_memory_bytes": COUNT,
    "notes": items_of(TEXT), "compute": by_name(TEXT), "loader": TEXT,
}, {"out": TEXT, "verification": VERIFICATION, "embeddings": items_of(LAYER),
    "structures": items_of(STRUCTURE), "recoveries": items_of(RECOVERY), "probe": PROBE})  # fmt: skip
LOSS = record({"sparsity": NUMBER, "num_bits": COUNT, "error": NUMBER}, {"kl": NUMBER})
TABLE = record({
    "base": TEXT, "base_sha256": TEXT, "calibration": SOURCE,
    "groups": items_of(record({"names": items_of(TEXT), "size": COUNT, "losses": items_of(LOSS)})),
    "prune": PRUNE, "quant": QUANT, "solver": SOLVER, "seconds": NUMBER,
}, {"text": SOURCE})  # fmt: skip
OBJECTIVE = record({"measure": TEXT, "tasks_of_sr": items_of(TEXT)}, {"limit": COUNT})
CONSTRAINT = record({"objective": OBJECTIVE, "bound": NUMBER})
SEARCH = record({
    "model": TEXT, "target": {"anyOf": [TARGET, CONSTRAINT]}, "command": TEXT, "trials": COUNT,
    "seconds": NUMBER, "groups": items_of(items_of(TEXT)), "sensitivity": TABLE,
    "measured": items_of(record({"kl": NUMBER, "complete": FLAG,
                                 "levels": items_of(nullable(TEXT))}, {"number": COUNT})),
    "chosen": TEXT, "objective": OBJECTIVE,
    "choice": by_name(record({"kl": KL, "value": nullable(NUMBER)})),
    "finalists": items_of(EVALUATION), "fingerprint": TEXT, "settings": by_name(TEXT),
}, {"out": TEXT})  # fmt: skip
INSPECTION = record({
    "model": TEXT, "architecture": TEXT, "dtype": TEXT, "parameters": COUNT,
    "linear_parameters": COUNT, "base_bytes": COUNT, "output_head": nullable(TEXT),
    "tied_embeddings": FLAG, "quantized": FLAG,
    "blocks": items_of(record({"name": TEXT, "units": items_of(
        record({"linears": items_of(TEXT), "shapes": items_of(items_of(COUNT, 2))}))})),
    "embeddings": items_of(record({"name": TEXT, "shape": items_of(COUNT, 2), "bits": COUNT})),
})  # fmt: skip


def check(data, schema):
    """Whether ``data`` fits; raises jsonschema.ValidationError with the place where it does not."""
    jsonschema.Draft202012Validator(schema).validate(data)


def renamed(data, schema):
    """(path, copy of ``data`` with the key at its end renamed), for every key that ``schema`` names."""
    for path in _keys(data, schema):
        changed = copy.deepcopy(data)
        parent = changed
        for step in path[:-1]:
            parent = parent[step]
        parent[f"{path[-1]}_"] = parent.pop(path[-1])
        yield path, changed


def _keys(data, schema):
    """Paths to all keys of ``data`` that are named, of a list and of an object with free keys in its first
    entry."""
    fitting = (s for s in schema.get("anyOf", [schema]) if _fits(data, s))
    schema = next(fitting)
    if "properties" in schema:
        for key, value in data.items():
            yield (key,)
            yield from ((key, *path) for path in _keys(value, schema["properties"][key]))
    elif isinstance(data, dict) and data:
        key = next(iter(data))
        yield from ((key, *path) for path in _keys(data[key], schema["additionalProperties"]))
    elif isinstance(data, list) and data:
        yield from ((0, *path) for path in _keys(data[0], schema["items"]))


def _fits(data, schema):
    return jsonschema.Draft202012Validator(schema).is_valid(data)
