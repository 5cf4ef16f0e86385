"""Compare srcr with llm-compressor, GPTQModel or AutoRound on the same data: time, memory and divergence.

    python benchmarks/peers.py MODEL... --peer-python PEER/bin/python --json out.json

Run it with the interpreter of an environment that has srcr and what it needs, as the peer's has; transformers
imports more where more is installed (accelerate, scipy), which takes time and memory:

    python3 -m venv SRCR
    SRCR/bin/pip install -c constraints.txt .

`peer_llmcompressor.py`, `peer_gptqmodel.py` (`--peer gptqmodel`) and `peer_autoround.py` (`--peer
autoround`) say how to make the peer's environment.
Each model writes its own calibration text, and evaluation text from another seed. Each run is its
own process, from start to exit, both sides with the same number of threads, in alternating order;
time and memory are medians over the repeats. Both sides write dense checkpoints with one scale an
output row. Divergence is the mean KL(base || compressed) in float32 over the positions that
predict a token, and zeros are counted, by code of this file on either checkpoint: a bare
configuration is `bits`, a joint one `sparsity+bits`. The peer does not keep pruned weights at zero
while it quantizes, so compare the zeros as well.

This process never loads torch: on Linux a child's peak memory starts at its parent's.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from threading import Event, Thread
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

T = TypeVar("T")
PEERS = {
    name: Path(__file__).with_name(f"peer_{name}.py")
    for name in ("llmcompressor", "gptqmodel", "autoround")
}
CALIBRATION_SEED, EVALUATION_SEED = 1, 2
WRITING_BATCH, READING_BATCH = 64, 4


@dataclass(frozen=True)
class Run:
    """One process, measured from outside."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    reported: dict[str, Any]


class Stopwatch:
    """Wall time in which this process ran: while it is stopped (as by SIGSTOP), no time passes."""

    INTERVAL, LONGEST = 0.1, 1.0

    def __enter__(self) -> "Stopwatch":
        self.seconds, self._last, self._ended = 0.0, time.perf_counter(), Event()
        self._thread = Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        ended = False
        while not ended:
            ended = self._ended.wait(self.INTERVAL)
            now = time.perf_counter()
            self.seconds += min(now - self._last, self.LONGEST)
            self._last = now


def apart(function: Callable[..., T], *args: Any) -> T:
    """Calls `function` in a fresh process, so that this one stays small."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def self_written(model: str, samples: int, length: int, seed: int, path: Path) -> None:
    """Samples `samples` rows of `length` tokens from the model itself into `path`."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    first = net.config.bos_token_id
    net.generation_config.eos_token_id = None  # rows are full: text goes on after an end
    torch.manual_seed(seed)
    rows = []
    for start in range(0, samples, WRITING_BATCH):
        count = min(WRITING_BATCH, samples - start)
        prompt = torch.randint(net.config.vocab_size, (count, 1))
        if first is not None:
            prompt.fill_(first)
        rows.append(
            net.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=length - 1,
                pad_token_id=0,
            )
        )
    save_file({"input_ids": torch.cat(rows)}, path)


def shared_rows(left: Path, right: Path) -> int:
    from safetensors.torch import load_file

    rows = [{tuple(r) for r in load_file(p)["input_ids"].tolist()} for p in (left, right)]
    return len(rows[0] & rows[1])


def divergence(base: str, compressed: Path, data: Path) -> dict[str, float]:
    """Mean KL(base || compressed), and the share of zeros in the linear layers but the head."""
    import torch
    from safetensors.torch import load_file
    from torch.nn.functional import kl_div, log_softmax
    from transformers import AutoModelForCausalLM

    def load(name: str | Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()

    p, q = load(base), load(compressed)
    tokens = load_file(data)["input_ids"]
    total = 0.0
    with torch.inference_mode():
        for start in range(0, len(tokens), READING_BATCH):
            ids = tokens[start : start + READING_BATCH]
            log_p, log_q = (log_softmax(net(ids).logits[:, :-1], dim=-1) for net in (p, q))
            total += float(kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).sum())
    head = q.get_output_embeddings()
    linears = [m for m in q.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    zeros = sum(int((m.weight == 0).sum()) for m in linears)
    return {
        "kl": total / tokens[:, 1:].numel(),
        "zeros": zeros / sum(m.weight.numel() for m in linears),
    }


def measure(command: list[str], log: Path, environment: dict[str, str] | None = None) -> Run:
    """Runs a command to its end; the last line it prints may be a JSON object about itself."""
    printed = log.with_suffix(".out")
    with log.open("w") as err, printed.open("w") as out, Stopwatch() as watch:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = log.read_text()[-2000:]
        raise SystemExit(f"exit {process.returncode} from {' '.join(command)}\n{tail}")
    unit = 1 if sys.platform == "darwin" else 1024
    lines = printed.read_text().splitlines()
    reported = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return Run(watch.seconds, cpu_seconds, usage.ru_maxrss * unit, reported)


def commands(
    args: argparse.Namespace, model: str, sparsity: float, bits: int, data: Path, work: Path
) -> dict[str, list[str]]:
    same = ["--sparsity", str(sparsity), "--bits", str(bits), "--calibration", str(data)]
    same += ["--asymmetric"] if args.asymmetric else []
    commands: dict[str, list[str]] = {}
    if not args.skip_srcr:
        commands["srcr"] = [
            sys.executable,
            "-m",
            "srcr",
            "compress",
            model,
            "-o",
            str(work / "srcr"),
        ]
        commands["srcr"] += [*same, "--group-size", "-1", "--format", "dense", "--overwrite"]
        commands["srcr"] += ["--samples", str(args.samples), "--seq-len", str(args.seq_len)]
        commands["srcr"] += shlex.split(args.srcr_args)
    if not args.skip_peer:
        script = str(PEERS[args.peer])
        commands["peer"] = [args.peer_python, script, model, "--out", str(work / "peer")]
        commands["peer"] += [*same, "--threads", str(args.threads), *shlex.split(args.peer_args)]
    return commands


def compare(
    args: argparse.Namespace, model: str, config: str, calibration: Path, evaluation: Path
) -> dict[str, Any]:
    """All repeats of one configuration of one model."""
    before, _, after = config.rpartition("+")
    sparsity, bits = float(before or 0), int(after)
    work = calibration.parent
    sides = commands(args, model, sparsity, bits, calibration, work)
    runs: dict[str, list[Run]] = {side: [] for side in sides}
    for repeat in range(args.repeats):
        for side in list(sides)[:: -1 if repeat % 2 else 1]:
            shutil.rmtree(work / side, ignore_errors=True)
            runs[side].append(measure(sides[side], work / f"{side}.err"))
    row: dict[str, Any] = {"model": model, "config": config, "asymmetric": args.asymmetric}
    for side, results in runs.items():
        row[side] = {
            "seconds": median(r.seconds for r in results),
            "peak_bytes": median(r.peak_bytes for r in results),
            **apart(divergence, model, work / side, evaluation),
            "runs": [asdict(r) for r in results],
        }
    if len(runs) == 2:
        row["ratio"] = {k: row["srcr"][k] / row["peer"][k] for k in ("seconds", "peak_bytes", "kl")}
    return row


def show(rows: list[dict[str, Any]], peer: str) -> None:
    table = Table("model", "config", "side", "wall s", "peak MiB", "KL", "zeros")
    for row in rows:
        name = [Path(row["model"]).name, row["config"] + (" asym" if row["asymmetric"] else "")]
        for side, shown in (("srcr", "srcr"), ("peer", peer)):
            if r := row.get(side):
                wall, peak = f"{r['seconds']:.2f}", f"{r['peak_bytes'] / 2**20:.0f}"
                table.add_row(*name, shown, wall, peak, f"{r['kl']:.4f}", f"{r['zeros']:.3f}")
        if r := row.get("ratio"):
            ratios = [f"{r[k]:.3f}" for k in ("seconds", "peak_bytes", "kl")]
            table.add_row(*name, f"srcr / {peer}", *ratios, "", style="bold", end_section=True)
    Console().print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--peer", choices=list(PEERS), default="llmcompressor")
    parser.add_argument("--peer-python", help="interpreter of the peer's environment")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--eval-samples", type=int, default=192)
    parser.add_argument("--configs", default="4,3,0.25+4", help="BITS or SPARSITY+BITS, by commas")
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-args", default="", help="more options for the peer's script")
    parser.add_argument("--srcr-args", default="", help="more options for srcr compress")
    parser.add_argument("--skip-peer", action="store_true")
    parser.add_argument("--skip-srcr", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not args.skip_peer and not args.peer_python:
        parser.error("--peer-python is needed unless --skip-peer is given")
    return args


def main() -> None:
    args = arguments()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # for every process started from here
    rows: list[dict[str, Any]] = []
    for model in args.models:
        with tempfile.TemporaryDirectory() as folder:
            calibration = Path(folder, "calibration.safetensors")
            evaluation = Path(folder, "evaluation.safetensors")
            for path, samples, seed in (
                (calibration, args.samples, CALIBRATION_SEED),
                (evaluation, args.eval_samples, EVALUATION_SEED),
            ):
                apart(self_written, model, samples, args.seq_len, seed, path)
            if shared := apart(shared_rows, calibration, evaluation):
                raise SystemExit(f"{model}: calibration and evaluation share {shared} rows")
            for config in args.configs.split(","):
                rows.append(compare(args, model, config, calibration, evaluation))
                if args.json:
                    settings = {k: v for k, v in vars(args).items() if k != "json"}
                    machine = {"system": platform.platform(), "cpus": os.cpu_count()}
                    versions = {n: version(n) for n in ("torch", "transformers")}
                    record = {"settings": settings, "machine": machine, "versions": versions}
                    args.json.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")
    show(rows, args.peer)


if __name__ == "__main__":
    main()
