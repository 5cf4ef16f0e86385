"""Calibrate on your own texts, and measure on others of yours what the compressed model kept.

python examples/own_texts.py [MODEL] [OUT]
"""

import sys

import srcr
from srcr.bundled import texts


def main(model: str = "bundled", out: str = "small-own-texts") -> None:
    # Any list of strings will do; so will a datasets.Dataset, or token ids [n, len].
    mine, others = texts(200, seed=1), texts(100, seed=2)

    text = srcr.Calibration(mine, samples=16, seq_len=128)
    record = srcr.compress(model, out, calibration=text, sparsity=0.25, bits=4)
    print(f"TCr {record.rates.tcr:.4f}, {record.rates.stored_bytes / 1e6:.2f} MB stored")

    unseen = srcr.EvaluationText(others, samples=16, seq_len=128)
    (evaluation,) = srcr.evaluate(model, [out], unseen)
    kl = evaluation.divergence.kl
    print(f"KL {kl.value:.5f}, 95 % interval {kl.ci95[0]:.5f} to {kl.ci95[1]:.5f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
