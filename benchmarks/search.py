"""What a search gains over uniform configurations, and what it costs.

    python benchmarks/search.py bundled [--calibration bundled] [--seq-len 256] [--targets 0.75,0.8125,0.875]
        [--seeds 0] [--trials 200] [--json out.json]

For every target and seed: the KL, on text that nothing before has seen, of the finalist that the search chose
over that of the best uniform configuration (quantization alone or joint; the best by the same text, which
favours it), with the paired interval of the ratio, and the whole search's wall time over that of one
``srcr compress`` in a process of its own, in the same run. Symmetric, channel-wise.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from srcr.data.specs import Calibration
from srcr.metrics.intervals import ratio_interval
from srcr.models.checkpoint import open_model
from srcr.models.load import load_model
from srcr.planning.context import load_splits
from srcr.records.search import SearchResult
from srcr.serialize import from_dict, read_json, to_yaml
from srcr.storage.layout import SEARCH


def timed(*args: str) -> float:
    """Seconds of a ``srcr`` command.

    Raises:
        SystemExit: it fails.
    """
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "srcr", *args], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return time.perf_counter() - began


@torch.no_grad()
def document_kl(base: Any, folder: Path, ids: torch.Tensor) -> np.ndarray:
    """KL(base || compressed) summed over each sequence [n]."""
    model = load_model(folder, torch.float32)
    sums = []
    for part in ids.split(8):
        p, q = (m(part, use_cache=False).logits[:, :-1].log_softmax(-1) for m in (base, model))
        sums.append((p.exp() * (p - q)).sum((1, 2), dtype=torch.float64))
    return torch.cat(sums).numpy()


#: The plain compression.
JOINT = ("--sparsity", "0.25", "--bits", "4")


def settings(args: argparse.Namespace, seed: int) -> list[str]:
    """Options that both commands take."""
    samples = [] if args.samples is None else ["--samples", str(args.samples)]
    return ["--calibration", args.calibration, "--seq-len", str(args.seq_len), *samples,
            "--group-size", "-1", "--seed", str(seed)]  # fmt: skip


def run(args: argparse.Namespace, target: float, seed: int, work: Path) -> dict[str, Any]:
    """One search beside one plain compression."""
    data = settings(args, seed)
    plain = timed("compress", args.model, "-o", str(work / "plain"), *JOINT, *data)
    out = work / "out"
    options = ["--target", f"tcr={target}", "--trials", str(args.trials)]
    for name in ("sparsities", "widths", "database"):
        value = getattr(args, name)
        options += [] if value is None else [f"--{name}", str(value)]
    seconds = timed("search", args.model, "-o", str(out), *options, *data)
    result = from_dict(SearchResult, read_json(out / SEARCH))
    finalists = {each.compressed: each for each in result.finalists}
    kl = {name: each.divergence.kl.value for name, each in finalists.items() if each.divergence}
    best = min((name for name in kl if name.startswith("uniform")), key=lambda name: kl[name])
    (work / "uniform.yaml").write_text(to_yaml(finalists[best].plan))
    timed("compress", args.model, "-o", str(work / "uniform"), "--plan", str(work / "uniform.yaml"),
          *data[: data.index("--group-size")])  # fmt: skip
    opened = open_model(args.model)
    base = opened.loaded(torch.float32)
    calibration = Calibration(args.calibration, args.samples, args.seq_len)
    ids = load_splits(calibration, opened, opened.parameters, seed).test.input_ids
    ratio = ratio_interval(*(document_kl(base, f, ids) for f in (out, work / "uniform")))
    return {
        "target": target, "seed": seed, "chosen": result.chosen, "best_uniform": best, "kl": kl,
        "ratio": ratio.value, "ci95": [ratio.low, ratio.high],
        "tcr": finalists[result.chosen].rates.tcr, "trials": result.trials, "seconds": seconds,
        "plain_seconds": plain, "price": seconds / plain,
    }  # fmt: skip


def main() -> None:
    """Run every target and seed, print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calibration", default="self")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--targets", default="0.75,0.8125,0.875")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--samples", type=int, help="sequences to calibrate on")
    parser.add_argument("--sparsities", help="of 'srcr search'")
    parser.add_argument("--widths", help="of 'srcr search'")
    parser.add_argument("--database", type=Path, help="of 'srcr search': levels that targets share")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as work:  # not counted: the first run compiles the kernels
        timed("compress", args.model, "-o", f"{work}/out", *JOINT, *settings(args, 0))
    for seed in map(int, args.seeds.split(",")):
        for target in map(float, args.targets.split(",")):
            with tempfile.TemporaryDirectory() as work:
                rows.append(run(args, target, seed, Path(work)))
            print(json.dumps(rows[-1]), file=sys.stderr)
            if args.json:
                args.json.write_text(json.dumps(rows, indent=2) + "\n")
    table = Table(title=f"search on {args.model}, {args.trials} candidates")
    for column in (
        "TCr",
        "seed",
        "chosen",
        "best uniform",
        "KL ratio [95 %]",
        "price in compressions",
    ):
        table.add_column(column)
    for row in rows:
        low, high = row["ci95"]
        table.add_row(
            f"{100 * row['tcr']:.2f} %", str(row["seed"]), row["chosen"], row["best_uniform"],
            f"{row['ratio']:.3f} [{low:.3f}, {high:.3f}]", f"{row['price']:.1f}",
        )  # fmt: skip
    mean = math.exp(sum(math.log(row["ratio"]) for row in rows) / len(rows))
    table.caption = f"geometric mean {mean:.3f}"
    Console().print(table)


if __name__ == "__main__":
    main()
