"""Which of srcr's compressed-tensors checkpoints each version of the library reads.

    pip install --no-deps --target FOLDERS/0.9.4 compressed-tensors==0.9.4   (and so on)
    python benchmarks/loading_compressed_tensors.py FOLDERS [-o out.md] [--golden FOLDER]

Writes small random checkpoints (every width, symmetric and with zero-points, whole rows and groups of 16,
several settings). Each version, in a process of its own with the torch and transformers of this one, parses
the `quantization_config`, unpacks a linear, and compares the weight bit by bit. "refused": the config is not
taken, or unpacking fails. "other shape", "other weights": it reads something else without a word. With
`--golden` the configs that a version takes are written there, which tests/formats compares with what srcr
writes now. Prints a table as Markdown, versions of the same results in one row.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file

from srcr.formats import get_format
from srcr.models.checkpoint import open_model
from srcr.plans.plan import CompressionPlan, LayerPlan
from srcr.plans.specs import QuantSpec
from srcr.testing import compressed_checkpoint, tiny_model

NAME = "model.layers.0.mlp.down_proj"

#: Run once for each version, over a folder of cases; prints one JSON object a line.
CHILD = """
import json, sys, warnings
from pathlib import Path
sys.path.insert(0, sys.argv[1])
warnings.simplefilter("ignore")
import torch
from importlib.metadata import version
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
print(json.dumps({"version": version("compressed-tensors")}), flush=True)
for folder in sorted(Path(sys.argv[2]).iterdir()):
    result = "exact"
    try:
        data = json.loads((folder / "config.json").read_text())
        config = QuantizationConfig.model_validate(data)
        scheme = next(
            group for group in config.config_groups.values()
            if "Linear" in group.targets or sys.argv[3] in group.targets
        )
        tensors = load_file(folder / "tensors.safetensors")
        expected = tensors.pop("expected")
        try:
            compressor = BaseCompressor.load_from_registry(config.format, config=config)
            weight = compressor.decompress_weight(tensors, scheme.weights)
        except (AttributeError, TypeError):  # since 0.15 a class method of another name
            compressor = BaseCompressor.get_value_from_registry(config.format)
            weight = compressor.decompress(tensors, scheme)["weight"]
        if weight.shape != expected.shape:
            result = f"other shape: {list(weight.shape)}"
        elif not torch.equal(weight.to(expected.dtype), expected):
            result = "other weights"
    except Exception as error:
        result = f"refused: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    print(json.dumps({"case": folder.name, "result": result}), flush=True)
"""


def cases() -> Iterator[tuple[str, CompressionPlan]]:
    """Every checkpoint by name: "3 bits, symmetric, whole rows"."""
    topology = open_model(tiny_model("llama", torch.bfloat16)).topology
    for symmetric in (True, False):
        for group, how in ((-1, "whole rows"), (16, "groups of 16")):
            for bits in range(2, 9):
                quant = QuantSpec("rtn", bits, group, symmetric)
                kind = "symmetric" if symmetric else "zero-points"
                layers = tuple(LayerPlan(name, None, quant) for name in topology.linears())
                yield f"{bits} bits, {kind}, {how}", CompressionPlan(layers)
    mixed = tuple(
        LayerPlan(name, None, QuantSpec("rtn", 4 if name == NAME else 8, 16))
        for name in topology.linears()
    )
    yield "4 bits beside 8, symmetric, groups of 16", CompressionPlan(mixed)


def write(plan: CompressionPlan, folder: Path) -> dict[str, Any]:
    """A checkpoint's config and the tensors of one linear, its weight among them; the config."""
    fmt = get_format("compressed-tensors")
    checkpoint = compressed_checkpoint(tiny_model("llama", torch.bfloat16), plan)
    with tempfile.TemporaryDirectory() as name:
        fmt.write(checkpoint, Path(name))
        config = json.loads((Path(name) / "config.json").read_text())["quantization_config"]
        tensors = load_file(Path(name) / "model.safetensors")
    parts = {
        key.removeprefix(f"{NAME}."): tensor
        for key, tensor in tensors.items()
        if key.startswith(f"{NAME}.")
    }
    expected = checkpoint.weight(NAME).to(checkpoint.dtype)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(parts | {"expected": expected}, folder / "tensors.safetensors")
    return config


def read(version: Path, folder: Path) -> tuple[str, list[str]]:
    """(the version, what came of each case)."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(version), str(folder), NAME],
        capture_output=True, text=True,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    if not lines:
        return version.name, [(done.stderr.strip().splitlines() or ["failed"])[-1]]
    return lines[0]["version"], [line["result"] for line in lines[1:]]


def table(names: list[str], results: list[tuple[str, list[str]]]) -> str:
    """Markdown: a row for versions that read the same, a column for each kind of checkpoint."""
    columns = list(dict.fromkeys(name.split(" bits", 1)[1].lstrip(", ") for name in names))
    rows: list[tuple[list[str], list[str]]] = []
    for version, given in results:
        cells = [_cell(column, names, given) for column in columns]
        if rows and rows[-1][1] == cells:
            rows[-1][0].append(version)
        else:
            rows.append(([version], cells))
    text = [f"| compressed-tensors | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    text += [f"| {', '.join(versions)} | {' | '.join(cells)} |" for versions, cells in rows]
    return "\n".join(text) + "\n"


def _cell(column: str, names: list[str], given: list[str]) -> str:
    """What came of a kind of checkpoint, by width: "2, 4, 8 exact; 3, 5 other weights"."""
    if len(given) < len(names):
        return given[0]
    widths: dict[str, list[str]] = {}
    for name, result in zip(names, given, strict=True):
        bits, kind = name.split(" bits", 1)
        if kind.lstrip(", ") == column:
            widths.setdefault(result.split(":")[0], []).append(bits)
    return "; ".join(f"{', '.join(bits)} {result}" for result, bits in widths.items())


def main() -> None:
    """Write every case, let every version read it, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, help="a folder of folders, one for each version")
    parser.add_argument("-o", "--output", type=Path, help="write the table here too")
    parser.add_argument("--golden", type=Path, help="write the configs that a version takes here")
    options = parser.parse_args()
    names, configs = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, plan) in enumerate(cases()):
            names.append(name)
            configs.append(write(plan, Path(folder) / f"{number:03d}"))
        versions = sorted(options.folders.iterdir(), key=lambda path: Version(path.name))
        results = [read(version, Path(folder)) for version in versions]
    text = table(names, results)
    sys.stdout.write(text)
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")
    for version, given in results if options.golden is not None else []:
        taken = {
            name: config
            for name, config, result in zip(names, configs, given, strict=True)
            if result == "exact"
        }
        golden = json.dumps(taken, separators=(",", ":")) + "\n"
        (options.golden / f"{version}.json").write_text(golden, encoding="utf-8")


if __name__ == "__main__":
    main()
