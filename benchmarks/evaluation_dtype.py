"""What an evaluation in bfloat16 would say, beside float32: candidates rounded to nearest in groups of 64.

python benchmarks/evaluation_dtype.py MODEL TEXT --bits 4,8
"""

import argparse
import copy
import time

import torch

from srcr.data.sources import evaluation_request, load_tokens
from srcr.data.specs import EvaluationText
from srcr.metrics.divergence import measure_divergence
from srcr.models.checkpoint import open_model

GROUP = 64


def rounded(model, topology, num_bits):
    """A copy of a model with the linears of its blocks rounded to so many bits, symmetric."""
    model, most = copy.deepcopy(model), 2 ** (num_bits - 1) - 1
    for ref in topology.matrices.values():
        weight = model.get_parameter(ref.parameter).data
        groups = weight.float().reshape(-1, GROUP)
        scale = (groups.abs().amax(1, keepdim=True) / most).clamp_min(1e-9)
        codes = (groups / scale).round().clamp(-most - 1, most)
        weight.copy_((codes * scale).reshape(weight.shape))
    return model


@torch.no_grad()
def main() -> None:
    """Print the figures in either precision, and of the base in bfloat16 against itself in float32."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--bits", default="4,8")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    options = parser.parse_args()
    opened = open_model(options.model)
    text = EvaluationText(options.text, options.samples, options.seq_len)
    tokens = load_tokens(evaluation_request(text, 0), opened)
    bases = {dtype: opened.loaded(dtype) for dtype in (torch.float32, torch.bfloat16)}
    widths = [int(bits) for bits in options.bits.split(",")]
    stored = [rounded(bases[torch.bfloat16], opened.topology, bits) for bits in widths]
    for dtype, base in bases.items():
        candidates = [copy.deepcopy(model).to(dtype) for model in stored]
        started = time.process_time()
        results = measure_divergence(base, candidates, tokens)
        seconds = time.process_time() - started
        for bits, result in zip(widths, results, strict=True):
            print(f"{dtype}, {bits} bits: KL {result.kl.value:.5f}, top-1 "
                  f"{result.top1_agreement.value:.4f}, perplexity {result.perplexity.base:.3f} -> "
                  f"{result.perplexity.compressed:.3f}, {seconds:.1f} CPU seconds for all")  # fmt: skip
    (result,) = measure_divergence(bases[torch.float32], [bases[torch.bfloat16]], tokens)
    print(f"base in bfloat16 against float32: KL {result.kl.value:.5f}, "
          f"top-1 {result.top1_agreement.value:.4f}")  # fmt: skip


if __name__ == "__main__":
    main()
