"""What the scripts of the peers share. It runs under their interpreters and imports nothing of srcr."""

import argparse
import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()


def parser(description: str) -> argparse.ArgumentParser:
    """The options that `peers.py` gives to every peer."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help=".safetensors with input_ids [n, len]")
    parser.add_argument("--sparsity", type=float, default=0.0)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    return parser


def run(
    args: argparse.Namespace,
    compress: Callable[[argparse.Namespace], dict[str, Any]],
    packages: Sequence[str],
) -> None:
    """Compress; stdout gets one JSON object with what that found and what the process took, everything else
    goes to stderr."""
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    with contextlib.redirect_stdout(sys.stderr):
        record = compress(args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    record |= {
        "process_seconds": time.perf_counter() - STARTED,
        "peak_rss_bytes": peak if sys.platform == "darwin" else peak * 1024,
        "versions": {name: version(name) for name in packages},
    }
    print(json.dumps(record), flush=True)
