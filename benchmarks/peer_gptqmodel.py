"""Compress one model with GPTQModel on a CPU, the way `peers.py --peer gptqmodel` compares it.

Runs under the peer's own interpreter and imports nothing of srcr. To make that environment (torch first,
and no isolation, since it looks for torch when built; 7.3.6 to 7.6.0 do not start on two cores, 7.7.0
wants torch 2.14.1):

    python3 -m venv PEER
    PEER/bin/pip install torch==2.13.0 "setuptools>=84.2.1,<85" wheel packaging ninja
    PEER/bin/pip install --no-build-isolation gptqmodel==7.2.0 requests

GPTQ with one scale an output row, columns by falling diagonal, on every linear layer but the output head; it
does not prune. GPTQModel imports torchvision for models that see, without asking for it: where there is
none, its place is taken by an empty module, for these models do not. The model needs a tokenizer, which is
loaded and not used, and linears whose inputs are a multiple of 32. The output is a plain dense checkpoint in
the model's own precision. Stdout gets one JSON object, everything else goes to stderr.
"""

import argparse
import contextlib
import importlib
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import peer

PACKAGES = ("gptqmodel", "transformers", "torch")
VISION = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")


def arguments() -> argparse.Namespace:
    parser = peer.parser(__doc__.splitlines()[0])
    parser.set_defaults(batch_size=16)
    args = parser.parse_args()
    if args.sparsity:
        parser.error(
            f"--sparsity {args.sparsity}: GPTQModel does not prune; use --configs of bits alone"
        )
    return args


def without_vision() -> None:
    """Let ``import torchvision`` succeed where it would not."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        importlib.import_module("transformers")  # which looks for the real one
        for name in VISION:
            sys.modules[name] = MagicMock(__spec__=None)


def compress(args: argparse.Namespace) -> dict[str, Any]:
    without_vision()
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(args.threads)
    config = QuantizeConfig(
        bits=args.bits,
        group_size=-1,
        sym=not args.asymmetric,
        format="gptq_v2",  # whose zero points are stored as they are; the older format takes 1 off
        desc_act=True,
        act_group_aware=False,  # of groups, of which there are none
        device="cpu",
        offload_to_disk=False,
    )
    model = GPTQModel.load(str(Path(args.model).resolve()), config)
    tokens = load_file(args.calibration)["input_ids"]
    rows = [{"input_ids": r[None], "attention_mask": torch.ones_like(r)[None]} for r in tokens]

    began = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as logs,
        contextlib.chdir(logs),
    ):  # it writes some beside itself
        model.quantize(rows, batch_size=args.batch_size)
    seconds = time.perf_counter() - began

    packed = {n: m for n, m in model.model.named_modules() if isinstance(m, TorchLinear)}
    args.out.mkdir(parents=True, exist_ok=True)
    for path in Path(args.model).iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, args.out / path.name)
    for path in Path(args.model).glob("*.safetensors"):
        state = load_file(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        for name, weight in state.items():
            if module := packed.pop(name.removesuffix(".weight"), None):
                dequantized = module.dequantize_weight().T.to(weight.dtype).contiguous()
                if dequantized.shape != weight.shape:
                    raise SystemExit(
                        f"{name}: {list(dequantized.shape)} instead of {list(weight.shape)}"
                    )
                state[name] = dequantized
        save_file(state, args.out / path.name, metadata)
    if packed:
        raise SystemExit(f"not in the model's files: {sorted(packed)}")
    return {"compression_seconds": seconds}


if __name__ == "__main__":
    peer.run(arguments(), compress, PACKAGES)
