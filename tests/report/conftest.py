# ruff: noqa: E501 - records read better whole
"""Artefacts of a dozen runs, as compress and evaluate write them, with values that hang together."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

SETTINGS = [
    # name, mode, structure, sparsity, bits, group size
    ("w4", "joint", "unstructured", 0.0, 4, 128),
    ("w3", "joint", "unstructured", 0.0, 3, 128),
    ("w2", "joint", "unstructured", 0.0, 2, 128),
    ("s25-w4", "joint", "unstructured", 0.25, 4, 128),
    ("s25-w4-case-a", "sequential-a", "unstructured", 0.25, 4, 128),
    ("s25-w4-case-b", "sequential-b", "unstructured", 0.25, 4, 128),
    ("s33-w3", "joint", "unstructured", 0.33, 3, 128),
    ("s50-w4", "joint", "unstructured", 0.5, 4, -1),
    ("2of4-w4", "joint", "2:4", 0.5, 4, 128),
    ("6of8-w4", "joint", "6:8", 0.25, 4, 128),
    ("s20-w5", "joint", "unstructured", 0.2, 5, 128),
    ("s50-dense", "joint", "unstructured", 0.5, 16, 128),
]
LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
PROMPTS = (
    "One day the old miller walked to the",
    "Ana is taller than Ben. Ben is taller than Cleo. The tallest is",
    "In the spring the river near the town was",
    "Finn put the key in the blue box and",
    "The sum of 27 and 15 is",
)
BASE = "models/tiny-llama"
BASE_BYTES = 4_436_216
BLOCK_PARAMETERS = 1_900_000


def _around(value: float, width: float, top: float = math.inf) -> list[float]:
    return [max(0.0, value - width), min(top, value + width)]


def _rates(sparsity: float, bits: int) -> dict[str, Any]:
    kept = bits if bits < 16 else 16
    stored = BASE_BYTES - int(BLOCK_PARAMETERS * (16 - kept) / 8) + (30_000 if bits < 16 else 0)
    return {
        "sparsity": sparsity, "bits": float(bits), "tcr": 1 - (1 - sparsity) * bits / 16,
        "zeros": sparsity + (1 - sparsity) * 0.14 if bits < 16 else sparsity,
        "base_bytes": BASE_BYTES, "stored_bytes": stored, "loaded_bytes": stored + 12_000,
        "engine": "vllm" if bits < 16 else "transformers", "source": "srcr.json",
        "entropy_bits": bits * (1 - 0.2 * sparsity) * 0.91 if bits < 16 else None,
    }  # fmt: skip


def _record(name: str, sparsity: float, bits: int, blocks: int, rng: Random) -> dict[str, Any]:
    layers = [
        {"name": f"model.layers.{block}.{linear}", "shape": [256, 256], "sparsity": sparsity,
         "bits": bits, "tcr": 1 - (1 - sparsity) * bits / 16, "zeros": sparsity, "entropy_bits": 0.91 * bits, "error": 0.002 * (1 + 9 * sparsity) * 3 ** (4 - min(bits, 8)) * rng.uniform(0.4, 2)}
        for block in range(blocks) for linear in LINEARS
    ]  # fmt: skip
    return {
        "base": BASE, "base_sha256": "9f" * 32,
        "command": f"srcr compress {BASE} -o runs/{name} --sparsity {sparsity} --bits {bits}",
        "format": "compressed-tensors" if bits < 16 else "dense", "rates": _rates(sparsity, bits),
        "plan_fingerprint": "0a1b2c3d4e5f6071",
        "calibration": {"source": "self", "samples": 128, "seq_len": 512, "sha256": "ab" * 32, "rows": ["x"] * 128},
        "layers": layers, "versions": {"srcr": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "seconds": 41.7, "peak_memory_bytes": 912_000_000, "notes": [],
    }  # fmt: skip


def _plan(
    mode: str, structure: str, sparsity: float, bits: int, group: int, record: dict[str, Any]
) -> str:
    lines = ["layers:"]
    for layer in record["layers"]:
        lines.append(f"- name: {layer['name']}")
        if sparsity:
            lines.append(
                f"  prune: {{method: sparsegpt, sparsity: {sparsity}, mask_structure: '{structure}'}}"
            )
        if bits < 16:
            lines.append(
                f"  quant: {{method: gptq, num_bits: {bits}, group_size: {group}, symmetric: true, actorder: static}}"
            )
    return "\n".join([*lines, "seed: 0", f"sweep: {{mode: {mode}}}", ""])


def _semantic(kept: float, rng: Random) -> dict[str, Any]:
    consistency = 0.35 + 0.65 * kept
    worst = [
        {
            "prompt": PROMPTS[i % len(PROMPTS)],
            "base": " market with his red lamp. He was happy, and the sun was warm over the hill.",
            "compressed": f" market with his old drum. He was {rng.choice(('sad', 'tired', 'proud'))}, and the wind was cold over the hill.",
            "similarity": 0.31 + 0.03 * i,
        }
        for i in range(10)
    ]
    return {
        "consistency": consistency, "ci95": _around(consistency, 0.012, 1), "chance": 0.352,
        "normalised": (consistency - 0.352) / 0.648, "normalised_ci95": _around((consistency - 0.352) / 0.648, 0.018, 1),
        "scorer": "all-MiniLM-L6-v2", "n": 200, "max_new_tokens": 32, "exact": max(0.0, kept - 0.4),
        "worst": worst, "source": "self",
    }  # fmt: skip


def _evaluation(name: str, sparsity: float, bits: int, rng: Random) -> dict[str, Any]:
    kl = (
        0.006
        * math.exp(1.35 * (4 - bits) if bits < 16 else -2)
        * math.exp(4 * sparsity)
        * rng.uniform(0.9, 1.1)
    )
    kept = math.exp(-1.4 * kl)
    tasks = {}
    for task, chance, base in (
        ("knowledge", 0.125, 0.964),
        ("reasoning", 0.38, 0.842),
        ("arithmetic", 0.25, 0.71),
    ):
        retention = max(0.0, min(1.02, kept * rng.uniform(0.97, 1.02)))
        tasks[task] = {
            "base": base, "compressed": chance + retention * (base - chance), "chance": chance,
            "retention": retention, "ci95": _around(retention, 0.02 + 0.05 * (1 - kept)),
            "p_value": 0.5 * kept**40 + 1e-9, "n": 1000, "flips": round(60 * (1 - kept)) + 3, "metric": "acc",
        }  # fmt: skip
    sr = sum(task["retention"] for task in tasks.values()) / 3
    rate = 1 - (1 - math.sqrt(sparsity)) * (1 - math.log2(16 / bits) / 4)
    top1 = math.exp(-0.7 * math.sqrt(kl))
    return {
        "base": BASE, "compressed": f"runs/{name}", "rates": _rates(sparsity, bits),
        "divergence": {
            "kl": {"value": kl, "ci95": [kl * 0.93, kl * 1.08], "p50": kl * 0.3, "p95": kl * 4, "p99": kl * 11, "p999": kl * 40,
                   "histogram": {"edges": [2.0**i for i in range(-12, 3)], "counts": [max(0, 2000 - 30 * (i - 8) ** 2) for i in range(16)]}},
            "top1_agreement": {"value": top1, "ci95": _around(top1, 0.006, 1)},
            "flips": {"value": (1 - top1) / 2, "ci95": _around((1 - top1) / 2, 0.004)},
            "perplexity": {"base": 5.62, "compressed": 5.62 * math.exp(kl), "ratio": {"value": math.exp(kl), "ci95": [math.exp(kl) * 0.99, math.exp(kl) * 1.01]}},
            "n_tokens": 32704,
        },
        "semantic": _semantic(kept, rng), "tasks": tasks,
        "sr": sr, "sr_ci95": _around(sr, 0.015), "srcr": sr * rate, "srcr_ci95": _around(sr * rate, 0.012),
        "items": {}, "text": {"source": "self", "samples": 64, "seq_len": 512, "sha256": "cd" * 32},
        "command": f"srcr evaluate {BASE} runs/{name} --tasks bundled --semantic --report",
        "seconds": 88.0, "versions": {"srcr": "0.1.0", "torch": "2.13.0"},
    }  # fmt: skip


def write_search(folder: Path) -> Path:
    """A run of its own, with the ``search.json`` of the search that made it."""
    (out,) = write_runs(folder, 1)
    levels = [(0.0, 2), (0.25, 4), (0.0, 4)]
    groups = [
        {"names": [f"model.layers.{i}.mlp.up_proj"], "size": 1000 * (i + 1), "losses": [
            {"sparsity": s, "num_bits": q, "error": 0.1 / q, "kl": (i + 1) * 0.08 / q**2} for s, q in levels]}
        for i in range(2)
    ]  # fmt: skip
    text = {"source": "self", "samples": 8, "seq_len": 64, "sha256": "ef" * 32}
    candidates = [(0.03, True, "0%+2", None), (0.09, True, "0%+2", "0%+2"), (0.02, True, "25%+4", "25%+4"),
                  (0.05, False, "0%+2", "0%+4"), (0.015, True, "0%+4", "0%+4")]  # fmt: skip
    measured = [
        {"kl": kl, "complete": complete, "levels": pair, "number": number}
        for number, (kl, complete, *pair) in enumerate(candidates, 1)
    ]
    search = {"chosen": "searched", "finalists": [], "measured": measured,
              "sensitivity": {"base": BASE, "base_sha256": "9f" * 32, "calibration": text, "groups": groups}}  # fmt: skip
    (out / "search.json").write_text(json.dumps(search))
    return out


def write_runs(folder: Path, n: int = 12, blocks: int = 4) -> list[Path]:
    """``n`` folders as ``srcr compress`` and ``srcr evaluate --report`` leave them."""
    folders = []
    for i in range(n):
        name, mode, structure, sparsity, bits, group = SETTINGS[i % len(SETTINGS)]
        rng = Random(i)
        out = folder / (name if i < len(SETTINGS) else f"{name}-{i}")
        out.mkdir(parents=True)
        record = _record(out.name, sparsity, bits, blocks, rng)
        (out / "srcr.json").write_text(json.dumps(record))
        (out / "plan.yaml").write_text(_plan(mode, structure, sparsity, bits, group, record))
        (out / "evaluation.json").write_text(json.dumps(_evaluation(out.name, sparsity, bits, rng)))
        folders.append(out)
    return folders


@pytest.fixture(scope="session")
def make_runs() -> Callable[..., list[Path]]:
    """:func:`write_runs`."""
    return write_runs


@pytest.fixture(scope="session")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a search wrote; not to be changed."""
    return write_search(tmp_path_factory.mktemp("search"))


@pytest.fixture(scope="session")
def dozen(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of twelve runs; not to be changed."""
    return write_runs(tmp_path_factory.mktemp("runs"))
