"""Peak memory of a whole ``srcr compress`` process, in which step it comes, and how it grows with depth.

    python benchmarks/memory.py [--layers 16,32] [--width 2048] [--ffn 8192] [--budget 2GB] [--json out.json]

Each model is a random Llama in bfloat16, made once in --work and calibrated on random tokens from a file. The
peak is the process's own, from start to exit, as the operating system counts it; "imports" is a process
that begins, imports and ends as compress does, and does nothing else. The highest resident memory of each
step is sampled every 5 ms by a thread within the process, which the peak includes; the estimate is srcr's
own, by shapes.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

IMPORTS = """
from srcr.cli import process
def imports():
    import srcr
    srcr.compress
    import srcr.numerics.kernels.cpu, transformers.models.llama.modeling_llama
process.main = imports
process.start()
"""
MAKE = Path(__file__).with_name("random_llama.py")

#: Runs the command line that follows a file's name, and writes there what each step took.
WATCHED = """
import json, sys, threading, time
import torch
from srcr.cli import process
from srcr.engine.block import BlockPair
from srcr.environment import resident_memory
from srcr.formats import verify
from srcr.models.blockwise import BlockwiseModel
from srcr.pipelines import blocks, compress
file, highest, steps = sys.argv.pop(1), {}, ["load"]
def watch():
    while True:
        step, now = steps[-1], resident_memory(torch.device("cpu"))
        highest[step] = max(now, highest.get(step, 0))
        time.sleep(0.005)
def step(owner, name, label):
    plain = getattr(owner, name)
    def watched(*given, **named):
        steps.append(label)
        try:
            return plain(*given, **named)
        finally:
            steps.pop()
    setattr(owner, name, watched)
for owner, name, label in [
    (BlockwiseModel, "block", "weights"), (BlockPair, "statistics", "moments"),
    (blocks, "solve", "solve"), (BlockPair, "advance", "forward"),
    (compress, "_write", "write"), (compress, "verify_tensors", "verify"),
    (compress, "verify_logits", "logits"), (compress, "_hash_weights", "hash"),
]:
    step(owner, name, label)
choose = compress.choose_policy
def chosen(estimate, *given):
    policy, note = choose(estimate, *given)
    highest["before the blocks"] = resident_memory(torch.device("cpu"))
    highest["estimate"] = highest["before the blocks"] + estimate.of(policy)
    streams = estimate.batches + estimate.dense_batches
    states = 0 if policy.activation_folder else streams * estimate.states
    highest["of it activations"] = estimate.passes(policy) * estimate.forward + states
    return policy, note
compress.choose_policy = chosen
threading.Thread(target=watch, daemon=True).start()
try:
    process.start()
finally:
    with open(file, "w") as stream:
        json.dump(highest, stream)
"""


def measured(command: list[str]) -> dict[str, float]:
    """Seconds and peak bytes of a process.

    Raises:
        SystemExit: it fails.
    """
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    message = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(message.decode()[-2000:])
    unit = 1 if sys.platform == "darwin" else 1024
    return {"seconds": time.perf_counter() - began, "peak_bytes": usage.ru_maxrss * unit}


def compress(options: argparse.Namespace, layers: int) -> dict[str, Any]:
    """Make the model where it is missing, compress it, measure."""
    name = f"llama-{layers}x{options.width}x{options.ffn}-{options.samples}x{options.seq_len}"
    folder = options.work / name
    if not (folder / "config.json").exists():
        make = [sys.executable, str(MAKE), str(folder), "--layers", str(layers)]
        make += ["--ids", str(options.work / f"{name}.safetensors")]
        for key in ("width", "ffn", "vocabulary", "samples", "seq_len"):
            make += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
        subprocess.run(make, check=True)
    out = options.work / "out"
    shutil.rmtree(out, ignore_errors=True)
    steps = options.work / "steps.json"
    command = [sys.executable, "-c", WATCHED, str(steps), "compress", str(folder), "-o", str(out)]
    command += [] if options.budget is None else ["--memory", options.budget]
    command += ["--sparsity", "0.25", "--bits", "4", "--samples", str(options.samples)]
    command += [
        "--calibration",
        str(options.work / f"{name}.safetensors"),
        "--seq-len",
        str(options.seq_len),
    ]
    row: dict[str, Any] = measured(command)
    row["layers"] = layers
    row["steps"] = json.loads(steps.read_text(encoding="utf-8"))
    row["base_bytes"] = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    shutil.rmtree(out)
    return row


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", default="16,32")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", help="as srcr compress --memory")
    parser.add_argument("--work", type=Path, default=Path("build/memory"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    table = Table("", "model files, MB", "seconds", "peak, MB", "MB at most in each step")
    imports: dict[str, Any] = dict(measured([sys.executable, "-c", IMPORTS]))
    table.add_row("imports", "", f"{imports['seconds']:.1f}", f"{imports['peak_bytes'] / 1e6:.0f}")
    rows = [imports]
    for layers in map(int, options.layers.split(",")):
        row = compress(options, layers)
        rows.append(row)
        size = f"{row['base_bytes'] / 1e6:.0f}"
        table.add_row(
            f"{layers} layers",
            size,
            f"{row['seconds']:.0f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
            ", ".join(f"{step} {taken / 1e6:.0f}" for step, taken in row["steps"].items()),
        )
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    Console().print(table)


if __name__ == "__main__":
    main()
