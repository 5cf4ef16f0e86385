"""Compress one model with llm-compressor, the way `peers.py` compares it with srcr.

Runs under the peer's own interpreter and imports nothing of srcr. To make that environment:

    python3 -m venv PEER
    PEER/bin/pip install torch==2.13.0
    PEER/bin/pip install llmcompressor==0.14.0.1

SparseGPT (unstructured) and then GPTQ (integer weights, one scale an output row), both on every
linear layer but the output head. `--pipeline sequential` calibrates both in one walk over the
blocks; `independent`, the default of `oneshot`, walks once for each. Its GPTQ keeps no mask (since
its pull request 2860) and no modifier puts one back in a one-shot run, so some pruned weights come
back non-zero: `zeros` counts what is exactly zero at the end, in all those layers. The output is a
plain dense checkpoint. Stdout gets one JSON object, everything else goes to stderr.
"""

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import peer

PACKAGES = ("llmcompressor", "compressed-tensors", "transformers", "torch")


def arguments() -> argparse.Namespace:
    parser = peer.parser(__doc__.splitlines()[0])
    parser.add_argument("--pipeline", choices=["sequential", "independent"], default="sequential")
    args = parser.parse_args()
    if args.sparsity == 0 and args.bits == 16:
        parser.error("--sparsity 0 with --bits 16 (no quantization) leaves nothing to do")
    return args


def recipe(args: argparse.Namespace, head: str) -> list[Any]:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning import SparseGPTModifier

    ignore = [f"re:.*{head}"]  # SparseGPT matches "lm_head.", with the dot: the plain name misses
    steps: list[Any] = []
    if args.sparsity > 0:
        steps.append(SparseGPTModifier(sparsity=args.sparsity, targets=["Linear"], ignore=ignore))
    if args.bits < 16:
        weights = QuantizationArgs(
            num_bits=args.bits, type="int", symmetric=not args.asymmetric, strategy="channel"
        )
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        steps.append(GPTQModifier(config_groups={"group_0": scheme}, ignore=ignore))
    return steps


def compress(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from llmcompressor import oneshot
    from safetensors.torch import load_file
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, PreTrainedModel

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    names = set(model.state_dict())
    tokens = load_file(args.calibration)["input_ids"]
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]

    began = time.perf_counter()
    oneshot(
        model=model,
        processor=object(),  # the data are tokens already: no tokenizer is needed, nor loaded
        dataset=DataLoader(rows, batch_size=args.batch_size),
        recipe=recipe(args, head),
        pipeline=args.pipeline,
    )
    seconds = time.perf_counter() - began

    # the weights already hold the dequantized values: leave scales and the quantization config out
    state = {name: tensor for name, tensor in model.state_dict().items() if name in names}
    if missing := names - set(state):
        raise SystemExit(f"llm-compressor renamed tensors, no dense checkpoint: {sorted(missing)}")
    PreTrainedModel.save_pretrained(model, args.out, state_dict=state)
    for path in Path(args.model).glob("*token*"):
        shutil.copyfile(path, args.out / path.name)

    linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != head]
    zeros = sum(int((m.weight == 0).sum()) for m in linears)
    return {
        "compression_seconds": seconds,
        "zeros": zeros / sum(m.weight.numel() for m in linears),
    }


if __name__ == "__main__":
    peer.run(arguments(), compress, PACKAGES)
