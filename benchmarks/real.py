"""Real models: srcr's ways of reaching TCr 75, 81.25 and 87.5 %, and other tools', on the same data.

    python benchmarks/real.py run MODEL -o RESULTS --peers PEERS [--only NAME...] [--plan]
    python benchmarks/real.py table RESULTS... [-o docs/real_models.md]

MODEL is a folder (`../shared/models/fetch.py` makes two). PEERS holds an environment for each peer by
name (`PEERS/llmcompressor`, `PEERS/autoround`, `PEERS/gptqmodel`), made as `peer_*.py` say; peers without
one are left out. All calibrate on the same tokens, with one symmetric scale an output row. The base is
measured first, and tasks on which it is not above chance are left out from then on. Every step is a process
of its own, measured from outside; its result is a JSON file in RESULTS at once, and what is there is not
done again. Candidates of a group are evaluated together. `--isa avx2` keeps every process to older
instructions, with results named NAME.avx2.

This process never loads torch: on Linux a child's peak memory starts at its parent's.
"""

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peers import PEERS, Run, measure
from real_steps import ISA, Inputs, Step, command, plan

DATA_SCRIPT = Path(__file__).with_name("real_data.py")
BASE_SCRIPT = Path(__file__).with_name("real_base.py")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
#: Settings that do not decide a result.
FREE = ("out", "only", "plan", "isa", "peers", "function")


def machine(isa: str, threads: int) -> dict[str, Any]:
    """The CPU, what it can do, and what it is kept to."""
    info: dict[str, str] = {}
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        pairs = [line.split(":", 1) for line in lines if ":" in line]
        info = {key.strip(): value.strip() for key, value in reversed(pairs)}
    flags = set(info.get("flags", "").split())
    return {
        "cpu": info.get("model name", platform.processor()),
        "model": "-".join(info.get(key, "?") for key in ("cpu family", "model", "stepping")),
        "flags": [flag for flag in FLAGS if flag in flags],
        "cpus": os.cpu_count(),
        "threads": threads,
        "isa": isa,
        "environment": ISA[isa],
        "system": platform.platform(),
    }


class Folder:
    """The results: JSON files, the candidates, logs and data."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.root: Path = options.out
        self.options = options
        self.suffix = "" if options.isa == "native" else f".{options.isa}"
        for name in ("models", "logs", "data"):
            (self.root / name).mkdir(parents=True, exist_ok=True)

    def result(self, name: str) -> Path:
        """The JSON of a step."""
        return self.root / f"{name}{self.suffix}.json"

    def model(self, name: str) -> Path:
        """The checkpoint of a step."""
        return self.root / "models" / f"{name}{self.suffix}"

    def read(self, name: str) -> dict[str, Any] | None:
        """What is known of a step; None if nothing."""
        path = self.result(name)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def write(self, name: str, record: dict[str, Any]) -> None:
        """Keep a step's result, whole or not at all."""
        path = self.result(name)
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    def run(self, line: Sequence[str], name: str) -> Run:
        """A command, measured.

        Raises:
            SystemExit: it fails.
        """
        environment = os.environ | ISA[self.options.isa]
        environment["OMP_NUM_THREADS"] = str(self.options.threads)
        return measure(list(line), self.root / "logs" / f"{name}{self.suffix}.err", environment)


def check_settings(options: argparse.Namespace) -> None:
    """Only runs with the same settings may share a folder."""
    mine = {key: str(value) for key, value in vars(options).items() if key not in FREE}
    path = options.out / "settings.json"
    if path.exists() and (theirs := json.loads(path.read_text(encoding="utf-8"))) != mine:
        keys = [key for key in mine if mine[key] != theirs.get(key)]
        raise SystemExit(f"{options.out} holds runs with other settings: {', '.join(keys)}")
    path.write_text(json.dumps(mine, indent=1) + "\n", encoding="utf-8")


def inputs(options: argparse.Namespace) -> Inputs:
    """What the steps are given."""
    return Inputs(
        options.model, options.out / "data", options.samples, options.seq_len, options.peers or Path(),
        options.trials, options.steps, options.threads,
    )  # fmt: skip


def evaluation(folder: Folder, candidates: Sequence[str], tasks: Path, name: str) -> list[Any]:
    """What `srcr evaluate` says of checkpoints, in one pass."""
    options, out = folder.options, folder.root / "logs" / f"{name}{folder.suffix}.json"
    line = [sys.executable, "-m", "srcr", "evaluate", options.model, *candidates, "-o", str(out)]
    line += ["--text", str(options.shared / "wikitext2_test.txt"), "--overwrite"]
    line += ["--samples", str(options.eval_samples), "--seq-len", str(options.seq_len)]
    if options.prompts:
        line += ["--semantic", "--prompts", str(options.prompts)]
    if any(tasks.glob("*.yaml")):
        line += ["--tasks", str(tasks.resolve())]
    run = folder.run(line, name)
    report = json.loads(out.read_text(encoding="utf-8"))
    reports = report if isinstance(report, list) else [report]
    return [each | {"run": asdict(run), "together": len(reports)} for each in reports]


def prepare(folder: Folder) -> None:
    """Calibration tokens and tasks; then the base on all tasks, of which those stay where it beats chance."""
    options, data = folder.options, folder.root / "data"
    if not (data / "calibration.safetensors").exists():
        line = [sys.executable, str(DATA_SCRIPT), options.model, str(options.shared), str(data)]
        for name in ("calibration", "samples", "seq_len", "blimp", "bbh", "gsm8k_steps", "gsm8k"):
            line += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        folder.run(line, "data")
    base = folder.read("base")
    if base is None:
        out = folder.root / "logs" / f"base{folder.suffix}.json"
        line = [sys.executable, str(BASE_SCRIPT), options.model, str(data / "tasks"), str(out)]
        done = folder.run(line, "base")
        base = {"name": "base", "machine": machine(options.isa, options.threads)}
        base |= {"run": asdict(done), "tasks": json.loads(out.read_text(encoding="utf-8"))}
        folder.write("base", base)
    kept = data / "kept"
    kept.mkdir(exist_ok=True)
    for name, score in base["tasks"].items():
        above = score["above_chance"]
        print(f"base on {name}: {score['base']:.3f}, chance {score['chance']:.3f}", end="")
        print("" if above else ": not above chance, left out")
        if above:
            shutil.copyfile(data / "tasks" / f"{name}.yaml", kept / f"{name}.yaml")


def compress(folder: Folder, step: Step) -> bool:
    """Make one candidate; whether it is there."""
    if folder.read(step.name) is not None:
        return True
    out = folder.model(step.name)
    shutil.rmtree(out, ignore_errors=True)
    line = command(step, inputs(folder.options), out)
    print(f"{step.name}: {' '.join(line)}", flush=True)
    try:
        run = folder.run(line, step.name)
    except SystemExit as error:
        print(f"{step.name} failed: {error}", flush=True)
        return False
    own = out / "srcr.json"
    record = asdict(step) | {
        "name": step.name,
        "label": step.label,
        "tcr": step.tcr,
        "command": line,
        "seconds": run.seconds,
        "cpu_seconds": run.cpu_seconds,
        "peak_bytes": run.peak_bytes,
        "reported": run.reported,
        "machine": machine(folder.options.isa, folder.options.threads),
        "record": json.loads(own.read_text(encoding="utf-8")) if own.exists() else None,
        "evaluation": None,
    }
    record["versions"] = (record["record"] or run.reported).get("versions")
    folder.write(step.name, record)
    print(f"{step.name}: {run.seconds:.0f} s, {run.peak_bytes / 2**20:.0f} MiB", flush=True)
    return True


def evaluate(folder: Folder, steps: Sequence[Step]) -> list[str]:
    """Measure the candidates of a group that are not measured yet; the names of those where that failed."""
    waiting = {}
    for step in steps:
        record = folder.read(step.name)
        if record is not None and record["evaluation"] is None:
            waiting[step.name] = record
    if not waiting:
        return []
    candidates = [str(folder.model(name)) for name in waiting]
    name = f"evaluate-{next(iter(waiting))}"
    try:
        reports = evaluation(folder, candidates, folder.root / "data" / "kept", name)
    except SystemExit as error:
        print(f"{name} failed: {error}", flush=True)
        return list(waiting)
    for (name, record), report in zip(waiting.items(), reports, strict=True):
        folder.write(name, record | {"evaluation": report})
        print(f"{name}: KL {report['divergence']['kl']['value']:.4f}", flush=True)
    return []


def run(options: argparse.Namespace) -> None:
    """Do the steps that are not done."""
    present = [p for p in PEERS if options.peers and (options.peers / p / "bin/python").exists()]
    steps = plan(present)
    if unknown := set(options.only or ()) - {step.name for step in steps}:
        raise SystemExit(f"no such step: {', '.join(sorted(unknown))}; --plan shows them")
    steps = [step for step in steps if not options.only or step.name in options.only]
    folder = Folder(options)
    if options.plan:
        for step in steps:
            record = folder.read(step.name)
            state = "-" if record is None else "measured" if record["evaluation"] else "made"
            print(f"{state:9} {step.name:24} TCr {100 * step.tcr:.2f} %  {step.label}")
        return
    check_settings(options)
    prepare(folder)
    missing = []
    for group in dict.fromkeys(step.group for step in steps):
        members = [step for step in steps if step.group == group]
        missing += [step.name for step in members if not compress(folder, step)]
        missing += evaluate(folder, members)
    if missing:
        raise SystemExit(f"failed, see {folder.root / 'logs'}: {', '.join(missing)}")


def table(options: argparse.Namespace) -> None:
    """Write the page and its picture."""
    from real_table import write_page

    write_page(options.results, options.out)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    do = commands.add_parser("run", help="compress and measure")
    do.set_defaults(function=run)
    do.add_argument("model")
    do.add_argument("-o", "--out", type=Path, required=True, help="folder of the results")
    do.add_argument("--shared", type=Path, default=Path("../shared/data"))
    do.add_argument("--peers", type=Path, help="folder of the peers' environments")
    do.add_argument("--only", nargs="+", metavar="NAME", help="these steps")
    do.add_argument("--plan", action="store_true", help="print the steps and stop")
    do.add_argument("--isa", choices=list(ISA), default="native")
    do.add_argument(
        "--calibration",
        choices=["text", "self"],
        default="text",
        help="WikiText-2, or self-written",
    )
    do.add_argument("--samples", type=int, default=64, help="rows of calibration text")
    do.add_argument("--seq-len", type=int, default=256)
    do.add_argument("--eval-samples", type=int, default=64, help="rows of test text")
    do.add_argument("--blimp", type=int, default=12, help="pairs of each paradigm")
    do.add_argument("--bbh", type=int, default=30, help="items of each task")
    do.add_argument("--gsm8k-steps", type=int, default=30, help="items")
    do.add_argument("--gsm8k", type=int, default=10, help="items whose answer is generated")
    do.add_argument("--prompts", type=int, default=200, help="for semantic consistency")
    do.add_argument("--trials", type=int, default=200, help="of each search")
    do.add_argument("--steps", type=int, default=200, help="of AutoRound, each block")
    do.add_argument("--threads", type=int, default=2)
    show = commands.add_parser("table", help="write the page")
    show.set_defaults(function=table)
    show.add_argument("results", nargs="+", type=Path)
    show.add_argument("-o", "--out", type=Path, default=Path("docs/real_models.md"))
    return parser.parse_args()


def main() -> None:
    """Run, or write the page."""
    options = arguments()
    options.function(options)


if __name__ == "__main__":
    main()
