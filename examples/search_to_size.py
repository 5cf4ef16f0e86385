"""Let srcr choose every layer's bits so that the model's files have a given share of their size.

    python examples/search_to_size.py [MODEL] [SHARE] [OUT]

More trials find better plans; these few show how it goes.
"""

import sys

import srcr


def main(model: str = "bundled", share: str = "0.31", out: str = "small-searched") -> None:
    opened = srcr.open_model(model)  # read and traced once, for all that follows
    size = srcr.inspect(opened).base_bytes
    target = srcr.Target(stored_bytes=int(float(share) * size))
    levels = tuple(srcr.CompressionLevel(0.0, bits) for bits in (3, 4, 6))
    text = srcr.Calibration("bundled" if model == "bundled" else "self", samples=120, seq_len=64)
    result = srcr.search(
        opened, target, srcr.SearchSpace(levels), text, out, srcr.SearchSpec(trials=6)
    )
    for finalist in result.finalists:
        stored = finalist.rates.stored_bytes / 1e6
        print(f"{finalist.compressed:24} {stored:6.2f} MB   KL {finalist.divergence.kl.value:.5f}")
    print(f"chosen: {result.chosen}, in {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
