"""CPU milliseconds that a token takes which a model writes itself: the model, and drawing from its logits.

    python benchmarks/writing.py MODEL --dtype bfloat16 --rows 128 --position 250

One thread and CPU time, so that other work on the machine counts for little. ATEN_CPU_CAPABILITY=avx2 and
ONEDNN_MAX_CPU_ISA=AVX2 stand for an older CPU.
"""

import argparse
import time
from itertools import pairwise
from statistics import median

import torch

from srcr.data import sampling
from srcr.data.decoding import Decoder
from srcr.models.checkpoint import open_model


class TimedDecoder(Decoder):
    """A decoder that keeps when each of its steps began and ended."""

    steps: list[tuple[float, float]] = []  # noqa: RUF012

    def logits(self, ids):
        """As of the decoder."""
        start = time.process_time()
        result = super().logits(ids)
        self.steps.append((start, time.process_time()))
        return result


@torch.no_grad()
def main() -> None:
    """Print the medians over the steps behind ``--position`` tokens, without the first two."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--position", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sampling.Decoder = TimedDecoder
    model = open_model(options.model).loaded(getattr(torch, options.dtype))
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    beginning = torch.randint(vocabulary, (1, options.position), generator=generator)
    length = options.position + options.steps
    uniform = torch.rand(length, options.rows, generator=generator, dtype=torch.float64)
    sampling.write_rows(model, beginning.repeat(options.rows, 1), uniform)
    steps = TimedDecoder.steps[2:]
    token = 1000 / options.rows
    running = median(end - start for start, end in steps) * token
    drawing = median(after[0] - step[1] for step, after in pairwise(steps)) * token
    print(f"{options.dtype}, {options.rows} rows at {options.position}, "
          f"{torch.backends.cpu.get_cpu_capability()}: model {running:.2f} ms a token, "
          f"drawing {drawing:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
