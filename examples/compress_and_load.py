"""Compress a model to 4 bits, load it with transformers alone, and let it write.

    python examples/compress_and_load.py [MODEL] [OUT]

MODEL is a folder, a hub id, or "bundled" (the default).
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import srcr


def main(model: str = "bundled", out: str = "small-4bit") -> None:
    # Without any text of your own: "self" lets the model write it. Here few and short rows, to be quick.
    text = srcr.Calibration("bundled" if model == "bundled" else "self", samples=16, seq_len=128)
    record = srcr.compress(model, out, calibration=text, bits=4)
    rates = record.rates
    print(f"{rates.base_bytes / 1e6:.1f} MB became {rates.stored_bytes / 1e6:.1f} MB in {out}")

    compressed = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("The", return_tensors="pt")
    print(tokenizer.decode(compressed.generate(**ids, max_new_tokens=20, do_sample=False)[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
