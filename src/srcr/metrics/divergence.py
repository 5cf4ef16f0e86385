"""How far the compressed model's predictions are from the base model's, on the same text."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from srcr.errors import NumericalError
from srcr.metrics.intervals import ratio_interval
from srcr.metrics.quantiles import Quantiles
from srcr.types import Estimate

PERCENTS = (50.0, 95.0, 99.0, 99.9)


@dataclass(frozen=True)
class Divergence:
    """The compressed model against the base, over ``n_tokens`` predicted positions (len - 1 a sequence).

    ``kl``: mean KL(base || compressed) in nats; ``kl_percentiles``: its 50th, 95th, 99th and 99.9th
    percentile over positions; ``top1_agreement``: share of positions where both rank the same token
    first; ``flips``: share where exactly one of them ranks the text's own token first (after "Accuracy is
    Not All You Need", arXiv 2407.09141); ``perplexity_ratio``: compressed over base.
    """

    kl: Estimate
    kl_percentiles: tuple[float, float, float, float]
    top1_agreement: Estimate
    flips: Estimate
    base_perplexity: float
    perplexity: float
    perplexity_ratio: Estimate
    n_tokens: int


@dataclass
class Accumulator:
    """Collects batch by batch. A document leaves its sums behind, a position its KL in a temporary file:
    logits are never kept, and memory does not grow with the length of the documents."""

    kl: Quantiles = field(default_factory=Quantiles)
    sums: list[Tensor] = field(default_factory=list)
    n_tokens: int = 0

    def add(self, base_logits: Tensor, logits: Tensor, input_ids: Tensor) -> None:
        """Add a batch: logits [n, len, vocabulary] of both models for ``input_ids`` [n, len].

        Raises:
            NumericalError: a model's predictions are not finite.
        """
        target = input_ids[:, 1:, None]
        base = base_logits[:, :-1].float().log_softmax(-1)
        ours = logits[:, :-1].float().log_softmax(-1)
        losses = [-part.gather(-1, target)[..., 0] for part in (base, ours)]
        best = [part.argmax(-1) for part in (base, ours)]
        right = [part == target[..., 0] for part in best]
        kl = (base.exp() * (base - ours)).sum(-1)
        if not bool(torch.isfinite(kl).all()):
            raise NumericalError("the models' predictions are not finite on this text")
        self.kl.add(kl.cpu().numpy())
        self.n_tokens += kl.numel()
        parts = (kl, best[0] == best[1], right[0] != right[1], *losses, torch.ones_like(kl))
        self.sums.append(torch.stack([p.sum(-1, dtype=torch.float64) for p in parts]).cpu())

    def result(self) -> Divergence:
        """The figures over everything added."""
        kl, agree, flips, base_loss, loss, tokens = torch.cat(self.sums, dim=1).numpy()
        more = ratio_interval(loss - base_loss, tokens)
        ratio, low, high = (_exp(part) for part in (more.value, more.low, more.high))
        p50, p95, p99, p999 = self.kl.percentiles(PERCENTS)
        return Divergence(
            kl=ratio_interval(kl, tokens),
            kl_percentiles=(p50, p95, p99, p999),
            top1_agreement=ratio_interval(agree, tokens),
            flips=ratio_interval(flips, tokens),
            base_perplexity=_exp(base_loss.sum() / tokens.sum()),
            perplexity=_exp(loss.sum() / tokens.sum()),
            perplexity_ratio=Estimate(ratio, low, high, more.n),
            n_tokens=self.n_tokens,
        )


def _exp(loss: float) -> float:
    """The exponential, the largest number JSON can hold at most."""
    return float(np.exp(np.minimum(loss, 709)))
