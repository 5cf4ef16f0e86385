"""Whether this working tree writes the weight files of another commit, byte for byte.

    python benchmarks/same_bytes.py [--reference cb60a6f] [--stories FOLDER] [--keep FOLDER] [--json out.json]

Five configurations of the bundled model, of stories260K (where FOLDER is given) and of a tiny model of every
family are compressed by both trees on this machine; the smallest memory budget and a killed and resumed run
of this tree must give the same files too. --keep holds the reference's results for another time.
"""

import argparse
import hashlib
import io
import json
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from srcr.testing import FAMILIES, save_tiny_model

ROOT = Path(__file__).parents[1]
CONFIGURATIONS: dict[str, list[str]] = {
    "25 % + 4 bits": ["--sparsity", "0.25", "--bits", "4"],
    "3 bits": ["--bits", "3"],
    "2:4 + 4 bits": ["--structure", "2:4", "--bits", "4"],
    "sequential-a": ["--sparsity", "0.25", "--bits", "4", "--mode", "sequential-a"],
    "asymmetric dense": ["--sparsity", "0.25", "--bits", "4", "--asymmetric", "--format", "dense"],
}
#: Runs many commands in one process, so that imports are paid for once.
DRIVER = """
import json, sys
from srcr import cli
for arguments in json.load(sys.stdin):
    sys.argv = ["srcr", *arguments]
    try:
        cli.main()
    except SystemExit as stop:
        if stop.code:
            print("failed:", arguments, file=sys.stderr)
"""


def checkout(commit: str, folder: Path) -> Path:
    """The files of a commit, in ``folder``."""
    archive = subprocess.run(
        ["git", "archive", commit], cwd=ROOT, capture_output=True, check=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


def hashes(folder: Path) -> dict[str, str]:
    """The hash of every weight file, of their index and of the config, by name."""
    names = [p for pattern in ("*.safetensors", "*.index.json", "config.json")
             for p in folder.glob(pattern)]  # fmt: skip
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(names)}


def run(tree: Path, commands: Sequence[Sequence[str]]) -> None:
    """Run commands of the program as it is in a tree."""
    subprocess.run(
        [sys.executable, "-c", DRIVER], input=json.dumps(commands), text=True,
        env={"PYTHONPATH": str(tree / "src"), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "2"},
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip


def make_inputs(work: Path, stories: Path | None) -> dict[str, list[str]]:
    """Models by name: the folder and the calibration options of each. Made once."""
    generator = torch.Generator().manual_seed(0)
    ids = work / "ids.safetensors"
    if not ids.is_file():
        save_file({"input_ids": torch.randint(3, 96, (96, 64), generator=generator)}, ids)
    models = {}
    for family in FAMILIES:
        folder = work / "models" / family
        if not folder.is_dir():
            save_tiny_model(folder, family, torch.bfloat16 if family == "qwen3" else torch.float32)
        models[family] = [str(folder), "--calibration", str(ids)]
    models["bundled"] = [
        "bundled",
        "--calibration",
        "bundled",
        "--samples",
        "48",
        "--seq-len",
        "128",
    ]
    if stories is not None:
        models["stories260K"] = [str(stories), "--samples", "96", "--seq-len", "128"]
    return models


def with_smallest_budget(arguments: Sequence[str]) -> None:
    """Run with the smallest --memory that the program itself names, in a process of its own."""
    budget = "10MB"
    for _ in range(4):
        done = subprocess.run(
            [sys.executable, "-m", "srcr", *arguments, "--memory", budget], capture_output=True,
            text=True, env={"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin"},
        )  # fmt: skip
        if done.returncode == 0:
            return
        named = re.search(r"use at least ([0-9]+MB)", done.stderr)
        if named is None:
            break
        budget = named[1]
    raise SystemExit(f"no budget is enough: {done.stderr[-500:]}")


def kill_and_resume(arguments: Sequence[str], out: Path) -> None:
    """Kill a run when its first blocks are finished, and resume it."""
    command = [sys.executable, "-m", "srcr", *arguments, "--resume"]
    environment = {"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    partial = out.with_name(out.name + ".partial")
    while process.poll() is None and not (partial / "block-00001.tensors").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = subprocess.run(command, env=environment, capture_output=True, text=True)
    if resumed.returncode or "finished before" not in resumed.stderr:
        raise SystemExit(f"not resumed: {resumed.stderr[-500:]}")


def compare(options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """A row for each case: model, configuration, and whether all files are the same."""
    models = make_inputs(work, options.stories)
    cases = {
        f"{model}/{name}": ["compress", *source, *configuration]
        for model, source in models.items()
        for name, configuration in CONFIGURATIONS.items()
        if options.models is None or model in options.models
    }
    reference, current = work / "reference", Path(tempfile.mkdtemp(dir=work))

    def placed(folder: Path) -> list[list[str]]:
        commands = {case: [*command, "-o", str(folder / case)] for case, command in cases.items()}
        return [cmd for case, cmd in commands.items() if not (folder / case).is_dir()]

    if missing := placed(reference):
        with tempfile.TemporaryDirectory() as tree:
            run(checkout(options.reference, Path(tree)), missing)
    run(ROOT, placed(current))
    rows = [(case, reference / case, current / case) for case in cases]
    if not options.quick:
        for model in ("bundled", "stories260K"):
            case = f"{model}/25 % + 4 bits"
            if case not in cases:
                continue
            out = current / f"{model}-memory"
            with_smallest_budget([*cases[case], "-o", str(out)])
            rows.append((f"{model}/smallest --memory", reference / case, out))
            out = current / f"{model}-resumed"
            kill_and_resume([*cases[case], "-o", str(out)], out)
            rows.append((f"{model}/killed and resumed", reference / case, out))
    return [
        {"case": case, "same": bool(hashes(old)) and hashes(old) == hashes(new),
         "reference": hashes(old), "current": hashes(new)}
        for case, old, new in rows
    ]  # fmt: skip


def main() -> None:
    """Print a table; exit with 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", default="cb60a6f")
    parser.add_argument("--stories", type=Path)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--models", nargs="*", help="some of the models")
    parser.add_argument("--quick", action="store_true", help="no budgets, no kills")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.keep or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        rows = compare(options, work)
    table = Table(title=f"weight files of {options.reference} and of this tree")
    table.add_column("case")
    table.add_column("files")
    for row in rows:
        differing = [n for n, h in row["reference"].items() if row["current"].get(n) != h]
        text = "same" if row["same"] else f"DIFFER: {', '.join(differing) or 'missing'}"
        table.add_row(row["case"], text)
    Console().print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    raise SystemExit(not all(row["same"] for row in rows))


if __name__ == "__main__":
    main()
