"""Which of srcr's checkpoints each version of transformers loads, and whether to the very bits.

    python benchmarks/loading_matrix.py --python PATH [PATH ...] [--json out.json]

Writes small random checkpoints (every width, with and without zero-points, channel-wise and in groups, mixed
widths, widths that do not fill the packed words, every model family), and has each interpreter load them with
`AutoModelForCausalLM.from_pretrained`, run a forward pass and compare every compressed weight with what srcr
computed. The interpreters need torch, transformers and compressed-tensors, but not srcr. Rows in brackets are
settings that srcr refuses or writes otherwise: they show whether it still has to. Prints a table.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from readers import answers
from srcr.formats import get_format
from srcr.models.checkpoint import open_model
from srcr.plans.plan import CompressionPlan, LayerPlan
from srcr.plans.specs import QuantSpec
from srcr.testing import FAMILIES, compressed_checkpoint, tiny_model

EXPECTED = "expected.safetensors"  # in a folder of its own: transformers must not see it
BITS = tuple(range(2, 9))

#: Run by each interpreter over a folder of cases; prints one JSON object a line.
CHILD = """
import json, sys, warnings
from importlib.metadata import version
from pathlib import Path
warnings.simplefilter("ignore")
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
versions = {name: version(name) for name in ("transformers", "compressed-tensors", "torch")}
print(json.dumps({"versions": versions}), flush=True)
for folder in sorted(Path(sys.argv[1]).iterdir()):
    problem = None
    try:
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto").eval()
        with torch.no_grad():
            model(torch.arange(8)[None])
        parameters = dict(model.named_parameters())
        for name, expected in load_file(folder / "expected.safetensors").items():
            loaded = parameters[name]
            if loaded.dtype != expected.dtype or not torch.equal(loaded, expected):
                problem = f"other weights: {name}"
                break
    except Exception as error:
        problem = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    print(json.dumps({"case": folder.name, "problem": problem}), flush=True)
"""


@dataclass(frozen=True)
class Case:
    """One checkpoint: the row of the table it belongs to, its name there, and how it is made."""

    row: str
    name: str
    model: Callable[[], Any]
    quant: Callable[[int], QuantSpec]  # of the number of a linear's group
    change: Callable[[dict[str, Any]], None] | None = None  # to the quantization_config
    packed: bool = True


def _odd_widths() -> Any:
    """172 and 64 columns, as in stories260K: neither fills 32-bit words at every width."""
    config = AutoConfig.for_model(
        "llama", vocab_size=96, hidden_size=64, intermediate_size=172, num_hidden_layers=1,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def _mixed(symmetric: bool) -> Callable[[int], QuantSpec]:
    settings = ((2, -1), (3, 16), (4, 8), (8, -1))
    return lambda group: QuantSpec("rtn", *settings[group % len(settings)], symmetric)


def _uniform(bits: int, group_size: int, symmetric: bool) -> Callable[[int], QuantSpec]:
    return lambda group: QuantSpec("rtn", bits, group_size, symmetric)


def cases() -> Iterator[Case]:
    """Every checkpoint of the matrix."""
    for symmetric in (True, False):
        kind = "symmetric" if symmetric else "asymmetric"
        for dtype, label in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):

            def llama(dtype: torch.dtype = dtype) -> Any:
                return tiny_model("llama", dtype)

            for group, how in ((-1, "channel"), (16, "groups of 16")):
                for bits in BITS:
                    quant = _uniform(bits, group, symmetric)
                    yield Case(f"{kind}, {how}, {label}", f"{bits} bits", llama, quant)
            if symmetric:
                yield Case(f"symmetric, mixed widths and groups, {label}", "", llama, _mixed(True))
        for bits in BITS:
            quant = _uniform(bits, -1, symmetric)
            yield Case(f"{kind}, widths 64 and 172", f"{bits} bits", _odd_widths, quant)
        for family in FAMILIES:
            packed = family != "gpt2"
            row = f"{kind}, 4 bits, every family" if packed else f"dense, {family}"
            yield Case(
                row,
                family if packed else kind,
                lambda family=family: tiny_model(family),
                _uniform(4, -1, symmetric),
                packed=packed,
            )

    def llama32() -> Any:
        return tiny_model("llama")

    for bits in BITS:
        yield Case(
            "(asymmetric without the dequantize flag)", f"{bits} bits", llama32,
            _uniform(bits, -1, False), lambda config: config.pop("dequantize"),
        )  # fmt: skip
    yield Case(
        "(symmetric, mixed, with the dequantize flag)", "", llama32, _mixed(True),
        lambda config: config.update(dequantize=True),
    )  # fmt: skip
    yield Case("(asymmetric, mixed, with the dequantize flag)", "", llama32, _mixed(False))
    yield Case(
        "(asymmetric, mixed, without the dequantize flag)", "", llama32, _mixed(False),
        lambda config: config.pop("dequantize"),
    )  # fmt: skip


def write(case: Case, folder: Path) -> None:
    """The checkpoint of a case, and beside it the weights that it stands for."""
    out = folder / "model"
    opened = open_model(case.model())
    topology = opened.topology
    layers = [
        LayerPlan(name, None, case.quant(number))
        for number, group in enumerate(topology.groups())
        for name in group.names
    ]
    checkpoint = compressed_checkpoint(opened, CompressionPlan(tuple(layers)))
    out.mkdir()
    get_format("compressed-tensors" if case.packed else "dense").write(checkpoint, out)
    if case.change is not None:
        path = out / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        case.change(config["quantization_config"])
        path.write_text(json.dumps(config), encoding="utf-8")
    parameters = (topology.matrices[name].parameter for name in topology.linears())
    expected = {parameter: checkpoint.tensor(parameter) for parameter in parameters}
    save_file(expected, folder / EXPECTED)


def load(python: str, folder: Path) -> tuple[dict[str, str], dict[str, str | None]]:
    """(versions, problem of each case or None) as one interpreter finds them."""
    versions, *lines = answers(python, CHILD, folder, TRANSFORMERS_VERBOSITY="error")
    return versions["versions"], {line["case"]: line["problem"] for line in lines}


def cell(names: list[str], problems: list[str | None]) -> str:
    """How a row fared with one interpreter: all, none, or which failed; and why the first did."""
    failed = [
        (name, problem)
        for name, problem in zip(names, problems, strict=True)
        if problem is not None
    ]
    n = len(names)
    if not failed:
        return f"exact ({n})"
    which = "fails" if len(failed) == n else "fails at " + ", ".join(name for name, _ in failed)
    reason = failed[0][1]
    return f"{which} ({len(failed)} of {n}): {reason if len(reason) < 90 else reason[:87] + '...'}"


def main() -> None:
    """Write every case, let every interpreter load it, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--python", nargs="*", default=[], help="other interpreters; this one is always among them"
    )
    parser.add_argument("--json", type=Path, help="write every single result here")
    options = parser.parse_args()
    console = Console()
    every = list(cases())
    with tempfile.TemporaryDirectory() as name:
        for number, case in enumerate(every):
            folder = Path(name) / f"{number:03d}"
            folder.mkdir()
            write(case, folder)
        results = [load(python, Path(name)) for python in (sys.executable, *options.python)]
    rows = list(dict.fromkeys(case.row for case in every))
    table = Table(title=f"{len(every)} checkpoints: loaded, run, and compared bit by bit")
    table.add_column("checkpoint")
    for versions, _ in results:
        table.add_column(
            f"transformers {versions['transformers']}\n"
            f"compressed-tensors {versions['compressed-tensors']}"
        )
    for row in rows:
        numbers = [i for i, case in enumerate(every) if case.row == row]
        names = [every[i].name or "it" for i in numbers]
        table.add_row(
            row, *(cell(names, [problems[f"{i:03d}"] for i in numbers]) for _, problems in results)
        )
    console.print(table)
    if options.json is not None:
        data = [
            {
                "versions": versions,
                "cases": [
                    {"row": case.row, "name": case.name, "problem": problems[f"{i:03d}"]}
                    for i, case in enumerate(every)
                ],
            }
            for versions, problems in results
        ]
        options.json.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
