"""Which of srcr's gptq checkpoints GPTQModel loads, to which weights, and with which logits.

    python benchmarks/loading_gptq.py --python PEER/bin/python [-o out.md]

Writes small random checkpoints (every width, whole rows and groups of 32, symmetric and with zero-points,
three precisions, several settings, model families), and has the interpreter of an environment of its own,
which needs no srcr (benchmarks/peer_gptqmodel.py says how it is made), load each with `GPTQModel.load` and
its plain PyTorch kernel on the CPU. Compared are the weights that its layers compute, with those that srcr
reads, and the logits, with those of srcr.load in float32: GPTQModel runs in the 16 bits of the scales.
Prints a table as Markdown, with the versions.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from readers import answers, table
from srcr import bundled
from srcr.formats import get_format
from srcr.models.checkpoint import open_model
from srcr.plans.plan import CompressionPlan, LayerPlan
from srcr.plans.specs import PruneSpec, QuantSpec
from srcr.testing import compressed_checkpoint, tiny_model

#: What GPTQModel is told to run in: what scales are stored in.
RUNNING = {"float32": "float16", "float16": "float16", "bfloat16": "bfloat16"}
WIDE = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32,
}  # fmt: skip
NARROW = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
FAMILIES = {
    "llama": WIDE, "mistral": WIDE, "qwen2": WIDE, "qwen3": WIDE, "gemma2": WIDE, "gemma3": WIDE,
    "phi3": NARROW, "opt": {}, "gpt_neox": {}, "gpt2": {},
}  # fmt: skip

#: Run by the peer over a folder of cases; prints one JSON object a line.
CHILD = """
import importlib, json, logging, sys, warnings
from importlib.metadata import version
from pathlib import Path
from unittest.mock import MagicMock
warnings.simplefilter("ignore")
try:
    importlib.import_module("torchvision")
except (ImportError, RuntimeError):  # imported unasked, for models that see
    importlib.import_module("transformers")
    for name in ("", ".transforms", ".transforms.functional"):
        sys.modules["torchvision" + name] = MagicMock(__spec__=None)
import torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import load_file
versions = {name: version(name) for name in ("gptqmodel", "transformers", "torch")}
print(json.dumps({"versions": versions}), flush=True)
for folder in sorted(Path(sys.argv[1]).iterdir()):
    line = {"case": folder.name}
    try:
        running = getattr(torch, (folder / "running").read_text())
        loaded = GPTQModel.load(str(folder / "model"), backend=BACKEND.TORCH, device="cpu", dtype=running)
        expected = load_file(folder / "expected.safetensors")
        ids, logits = expected.pop(" ids"), expected.pop(" logits")
        modules = dict(loaded.model.named_modules())
        differing = 0
        missing = sum(name not in modules for name in expected)
        for name, weight in expected.items():
            if name not in modules:
                continue
            given = modules[name].dequantize_weight().T
            differing += int((given != weight.to(given.dtype)).sum())
        with torch.no_grad():
            given = loaded.model(ids, use_cache=False).logits.float()
        distance = float((given - logits).norm() / logits.norm())
        line |= {"differing": differing, "missing": missing, "logits": distance}
    except Exception as error:
        line["problem"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    print(json.dumps(line), flush=True)
"""


@dataclass(frozen=True)
class Case:
    """A checkpoint: the row and the column of the table, its model, and the quantization of each group."""

    row: str
    column: str
    model: Any
    quant: tuple[QuantSpec | None, ...]


def cases() -> Iterator[Case]:
    """Every checkpoint."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        label = str(dtype).removeprefix("torch.")
        for symmetric in (True, False):
            for group, how in ((-1, "whole rows"), (32, "groups of 32")):
                kind = "symmetric" if symmetric else "zero-points"
                for bits in (2, 3, 4, 8):
                    model = tiny_model("llama", dtype, **WIDE)
                    quant = (QuantSpec("rtn", bits, group, symmetric),)
                    yield Case(f"{label}, {kind}, {how}", f"{bits} bits", model, quant)
    several = (
        QuantSpec("rtn", 4, 32), QuantSpec("rtn", 8, -1), QuantSpec("rtn", 3, 32, False), None,
    )  # fmt: skip
    model = tiny_model("llama", torch.bfloat16, **WIDE)
    yield Case("bfloat16, llama, several settings and some left alone", "4 bits", model, several)
    for family, changes in FAMILIES.items():
        model = tiny_model(family, torch.bfloat16, **changes)
        yield Case(f"bfloat16, {family}", "4 bits", model, (QuantSpec("rtn", 4, -1),))


@torch.no_grad()
def write(case: Case, folder: Path) -> None:
    """The checkpoint of a case, and beside it the weights and logits that it stands for."""
    fmt, opened = get_format("gptq"), open_model(case.model)
    layers = [
        LayerPlan(name, PruneSpec("magnitude", 0.25), case.quant[number % len(case.quant)])
        for number, group in enumerate(opened.topology.groups())
        for name in group.names
    ]
    checkpoint = compressed_checkpoint(opened, CompressionPlan(tuple(layers)), fmt)
    fmt.check(checkpoint.contents)
    (folder / "model").mkdir(parents=True)
    fmt.write(checkpoint, folder / "model")
    for path in bundled.model_path().glob("tokenizer*"):  # GPTQModel wants some tokenizer
        shutil.copy(path, folder / "model")
    ids = torch.arange(3, 35)[None]
    logits = fmt.load(folder / "model", torch.float32)(ids, use_cache=False).logits
    weights = {name: checkpoint.weight(name).contiguous() for name in checkpoint.contents.schemes}
    save_file({" ids": ids, " logits": logits, **weights}, folder / "expected.safetensors")
    (folder / "running").write_text(RUNNING[str(opened.dtype).removeprefix("torch.")])


def cell(line: dict[str, Any]) -> str:
    """What came of a case."""
    if "problem" in line:
        return line["problem"][:110].replace("|", "/")
    weights = "exact" if not line["differing"] else f"{line['differing']} weights differ"
    if line["missing"]:
        weights = f"{line['missing']} linears are not there"
    return f"{weights}, logits {line['logits']:.2g}"


def report(every: list[Case], lines: list[dict[str, Any]]) -> str:
    """Markdown: a row for each kind of checkpoint, its widths in columns; the versions above."""
    versions = ", ".join(f"{name} {number}" for name, number in lines[0]["versions"].items())
    results = zip(every, lines[1:], strict=True)
    cells = table({(case.row, case.column): cell(line) for case, line in results})
    return f"GPTQModel's PyTorch kernel on a CPU: {versions}.\n\n{cells}"


def main() -> None:
    """Write every case, let the peer load it, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", required=True, help="the interpreter that has gptqmodel")
    parser.add_argument("-o", "--output", type=Path, help="write the table here too")
    options = parser.parse_args()
    every = list(cases())
    with tempfile.TemporaryDirectory() as name:
        for number, case in enumerate(every):
            write(case, Path(name) / f"{number:03d}")
        lines = answers(options.python, CHILD, Path(name), TORCHDYNAMO_DISABLE="1")
    text = report(every, lines)
    sys.stdout.write(text)
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
