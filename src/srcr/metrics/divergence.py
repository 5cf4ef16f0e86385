"""How far the compressed model's predictions are from the base model's, on the same text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from srcr.data.tokens import Batch, Tokens
from srcr.errors import NumericalError
from srcr.metrics.intervals import ratio_interval
from srcr.metrics.quantiles import Quantiles
from srcr.records.evaluation import Divergence, Estimate, KlEstimate, Perplexity

PERCENTS = (50.0, 95.0, 99.0, 99.9)
#: At most so many tokens, and so many logits, go through each model at a time.
BATCH_TOKENS, BATCH_LOGITS = 4096, 1 << 26
#: The largest logarithm whose exponential JSON can hold.
MAX_LOG = 709


@dataclass
class DivergenceAccumulator:
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
        compressed = logits[:, :-1].float().log_softmax(-1)
        losses = [-part.gather(-1, target)[..., 0] for part in (base, compressed)]
        best = [part.argmax(-1) for part in (base, compressed)]
        right = [part == target[..., 0] for part in best]
        kl = (base.exp() * (base - compressed)).sum(-1)
        if not bool(torch.isfinite(kl).all()):
            raise NumericalError("the models' predictions are not finite on this text")
        self.kl.add(kl.cpu().numpy())
        self.n_tokens += kl.numel()
        parts = (kl, best[0] == best[1], right[0] != right[1], *losses, torch.ones_like(kl))
        self.sums.append(torch.stack([p.sum(-1, dtype=torch.float64) for p in parts]).cpu())

    def result(self, rows: Tensor | None = None) -> Divergence:
        """The figures over everything added. ``rows`` [n]: the number of each document, in the order added
        (None: as they came); intervals draw documents by it."""
        sums = torch.cat(self.sums, dim=1)
        if rows is not None:
            sums = sums[:, rows.argsort()]
        kl, agree, flips, base_loss, loss, tokens = sums.numpy()
        mean_kl, difference = ratio_interval(kl, tokens), ratio_interval(loss - base_loss, tokens)
        return Divergence(
            kl=KlEstimate(mean_kl.value, mean_kl.ci95, *self.kl.percentiles(PERCENTS)),
            top1_agreement=ratio_interval(agree, tokens),
            flips=ratio_interval(flips, tokens),
            perplexity=Perplexity(
                base=_exp(base_loss.sum() / tokens.sum()),
                compressed=_exp(loss.sum() / tokens.sum()),
                ratio=Estimate(
                    _exp(difference.value), (_exp(difference.low), _exp(difference.high))
                ),
            ),
            n_tokens=self.n_tokens,
        )


@torch.no_grad()
def measure_divergence(
    base: Any,
    models: Sequence[Any],
    tokens: Tokens,
    on_pass: Callable[[int], None] = lambda model: None,
) -> list[Divergence]:
    """The divergence of each of ``models`` from ``base`` on ``tokens``, batch by batch: the base's logits of
    a batch serve every model. Neither padding nor a row's first token, which nothing predicts, counts.
    ``on_pass`` is told after each model's pass over a batch which it was: 0 the base, 1 the first of
    ``models``."""
    accumulators = [DivergenceAccumulator() for _ in models]
    batches = evaluation_batches(base, tokens)
    for batch in batches:
        ids = batch.input_ids.to(base.device)
        expected = base(ids, use_cache=False).logits
        on_pass(0)
        for number, (accumulator, model) in enumerate(zip(accumulators, models, strict=True), 1):
            accumulator.add(expected, model(ids, use_cache=False).logits, ids)
            on_pass(number)
    rows = torch.cat([batch.rows for batch in batches])
    return [accumulator.result(rows) for accumulator in accumulators]


def evaluation_batches(model: Any, tokens: Tokens) -> tuple[Batch, ...]:
    """The rows in batches of which a model's logits fit into memory."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return tokens.batches(min(BATCH_TOKENS, BATCH_LOGITS // vocabulary))


def _exp(loss: float) -> float:
    """The exponential, the largest number JSON can hold at most."""
    return float(np.exp(np.minimum(loss, MAX_LOG)))
