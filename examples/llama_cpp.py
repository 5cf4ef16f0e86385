"""A GGUF file for llama.cpp, checked by llama.cpp itself (pip install 'srcr[gguf]').

    python examples/llama_cpp.py MODEL [OUT]

Not for the bundled model: llama.cpp does not know how its tokenizer splits text.
"""

import sys

import srcr


def main(model: str, out: str = "small-gguf") -> None:
    # Embeddings at 8 bits too: on small models they are much of the file.
    text = srcr.Calibration("self", samples=16, seq_len=128)
    record = srcr.compress(
        model, srcr.Output(out, format="gguf"), calibration=text, bits=4, embeddings=8
    )
    print(f"{out}/model.gguf: {record.rates.stored_bytes / 1e6:.2f} MB")
    for check in srcr.verify(out).checks:
        print(f"{check.engine}: {check.outcome}{f' ({check.reason})' if check.reason else ''}")
    print(f"run it: llama-cli -m {out}/model.gguf")


if __name__ == "__main__":
    main(*sys.argv[1:])
