"""A random Llama in bfloat16 with a tied head, and random token ids to calibrate it: for time and memory.

    python benchmarks/random_llama.py FOLDER --layers 8 --width 512 --ffn 2048 --vocabulary 16000
        [--initializer-range 0.04] [--ids FILE.safetensors --samples 128 --seq-len 256]

Heads are 64 wide, four to a key. A wider initializer range than usual gives the compression of a random model
something to lose.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    """Make the model, and the ids if they are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    for name in ("layers", "width", "ffn", "vocabulary"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--initializer-range", type=float, default=0.02)
    parser.add_argument("--ids", type=Path)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    args = parser.parse_args()
    heads = args.width // 64
    config = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=args.width, intermediate_size=args.ffn,
        num_hidden_layers=args.layers, num_attention_heads=heads, num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=4096, tie_word_embeddings=True, initializer_range=args.initializer_range,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    model.save_pretrained(args.folder, max_shard_size="1GB")
    print(f"{args.folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters")
    if args.ids:
        ids = torch.randint(0, args.vocabulary, (args.samples, args.seq_len))
        save_file({"input_ids": ids}, args.ids)


if __name__ == "__main__":
    main()
