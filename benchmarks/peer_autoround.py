"""Compress one model with AutoRound on a CPU, the way `peers.py --peer autoround` compares it.

Runs under the peer's own interpreter and imports nothing of srcr. To make that environment:

    python3 -m venv PEER
    PEER/bin/pip install torch==2.13.0
    PEER/bin/pip install "auto-round==0.16.*"

SignRound (signed gradient descent on rounding and ranges, `--steps` a block, the package's other defaults)
with one scale an output row, on every linear layer of the blocks; it does not prune. Its symmetric grid has
2^b levels with a signed scale. The model needs a tokenizer, which is loaded and not used. The output is a
plain dense checkpoint in the model's own precision (format `fake`). AutoRound 0.16.1 leaves layers alone
whose width 32 does not divide, and writes the original weights back into a float32 checkpoint: so all layers
are checked to hold at most 2^b values a row. Stdout gets one JSON object, everything else goes to stderr.
"""

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import peer

PACKAGES = ("auto-round", "transformers", "torch")


def arguments() -> argparse.Namespace:
    parser = peer.parser(__doc__.splitlines()[0])
    parser.set_defaults(batch_size=8)
    parser.add_argument("--steps", type=int, default=200, help="of descent, each block")
    args = parser.parse_args()
    if args.sparsity:
        parser.error(
            f"--sparsity {args.sparsity}: AutoRound does not prune; use --configs of bits alone"
        )
    return args


def check_levels(folder: Path, names: list[str], bits: int) -> None:
    """Every row of the layers holds at most 2^bits values.

    Raises:
        SystemExit: one does not.
    """
    from safetensors.torch import load_file

    state = {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
    for name in names:
        ordered = state[f"{name}.weight"].float().sort(dim=1).values
        levels = int((ordered.diff(dim=1) != 0).sum(1).max()) + 1
        if levels > 2**bits:
            raise SystemExit(f"{name} was not quantized: a row of it holds {levels} values")


def compress(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from auto_round import AutoRound
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    head = model.get_output_embeddings()
    linears = [
        n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head
    ]
    tokens = load_file(args.calibration)["input_ids"]
    batches = [
        {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
        for rows in tokens.split(args.batch_size)
    ]
    began = time.perf_counter()
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(args.model),
        scheme="W4A16",
        bits=args.bits,
        group_size=-1,
        sym=not args.asymmetric,
        dataset=batches,
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        batch_size=args.batch_size,
        iters=args.steps,
        device_map="cpu",
        enable_torch_compile=False,
    )
    work = args.out / "work"
    rounding.quantize_and_save(str(work), format="fake")  # in a folder below, named by itself
    seconds = time.perf_counter() - began
    for path in next(work.rglob("config.json")).parent.iterdir():
        path.rename(args.out / path.name)
    shutil.rmtree(work)
    check_levels(args.out, linears, args.bits)
    for path in Path(args.model).glob("*token*"):
        shutil.copyfile(path, args.out / path.name)
    return {"compression_seconds": seconds}


if __name__ == "__main__":
    peer.run(arguments(), compress, PACKAGES)
