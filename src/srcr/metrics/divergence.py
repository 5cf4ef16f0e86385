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
from srcr.metrics.predictions import Predictions, has_pieces, pieces, predict
from srcr.metrics.quantiles import Quantiles
from srcr.records.estimate import Estimate
from srcr.records.evaluation import Divergence, Histogram, KlEstimate, Perplexity

PERCENTS = (50.0, 95.0, 99.0, 99.9)
#: The histogram's octaves: from 2**-20, which is float32's rounding, to 2**4 nats.
OCTAVES = (-20, 4)
#: At most so many tokens go through each model at a time; where logits come only for whole rows, at most so
#: many of them together.
BATCH_TOKENS, WHOLE_LOGITS = 4096, 1 << 26
#: The largest logarithm whose exponential JSON can hold.
MAX_LOG = 709


@dataclass(frozen=True, eq=False)
class Passes:
    """How tokens go through several models: ``batches`` that fit into memory in all of them, and of which
    models logits come ``in_pieces``."""

    batches: tuple[Batch, ...]
    in_pieces: tuple[bool, ...]


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
        base = base_logits[:, :-1].float().log_softmax(-1)
        self.add_positions(compare_positions(base, logits[:, :-1], input_ids[:, 1:]))

    def add_positions(self, compared: Tensor) -> None:
        """Add a batch of which :func:`compare_positions` compared every position, [5, n, len - 1].

        Raises:
            NumericalError: a model's predictions are not finite.
        """
        if not bool(torch.isfinite(compared[0]).all()):
            raise NumericalError("the models' predictions are not finite on this text")
        self.kl.add(compared[0].cpu().numpy())
        self.n_tokens += compared[0].numel()
        parts = torch.cat([compared, torch.ones_like(compared[:1])])
        self.sums.append(parts.sum(-1, dtype=torch.float64).cpu())

    def result(self, rows: Tensor | None = None) -> Divergence:
        """The figures over everything added. ``rows`` [n]: the number of each document, in the order added
        (None: as they came); intervals draw documents by it."""
        sums = torch.cat(self.sums, dim=1)
        if rows is not None:
            sums = sums[:, rows.argsort()]
        kl, agree, flips, base_loss, loss, tokens = sums.numpy()
        mean_kl, difference = ratio_interval(kl, tokens), ratio_interval(loss - base_loss, tokens)
        p50, p95, p99, p999 = self.kl.percentiles(PERCENTS)
        return Divergence(
            kl=KlEstimate(mean_kl.value, mean_kl.ci95, p50, p95, p99, p999, _histogram(self.kl)),
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


def compare_positions(base: Tensor, logits: Tensor, target: Tensor) -> Tensor:
    """Of each position, for ``base`` log probabilities and ``logits`` [n, positions, vocabulary] and the next
    token ``target`` [n, positions]: KL, whether the best tokens agree, whether one alone is right, and both
    losses; [5, n, positions]."""
    # In place where it can be: each of these tensors is the largest thing in memory.
    compressed = logits.float().log_softmax(-1)
    losses = [-part.gather(-1, target[..., None])[..., 0] for part in (base, compressed)]
    best = [part.argmax(-1) for part in (base, compressed)]
    right = [part == target for part in best]
    kl = torch.sub(base, compressed, out=compressed).mul_(base.exp()).sum(-1)
    return torch.stack(
        [kl, (best[0] == best[1]).float(), (right[0] != right[1]).float(), losses[0], losses[1]]
    )


@torch.no_grad()
def measure_divergence(
    base: Any,
    models: Sequence[Any],
    tokens: Tokens,
    on_pass: Callable[[int], None] = lambda model: None,
    passes: Passes | None = None,
) -> list[Divergence]:
    """The divergence of each of ``models`` from ``base`` on ``tokens``, batch by batch: the base's logits of
    a batch serve every model. Neither padding nor a row's first token, which nothing predicts, counts.
    ``on_pass`` is told after each model's pass over a batch which it was: 0 the base, 1 the first of
    ``models``. ``passes``: as :func:`plan_passes` has them of ``[base, *models]`` (None: planned here)."""
    accumulators = [DivergenceAccumulator() for _ in models]
    if passes is None:
        passes = plan_passes([base, *models], tokens)
    for batch in passes.batches:
        ids = batch.input_ids.to(base.device)
        predictions = []
        for number, model in enumerate((base, *models)):
            predictions.append(predict(model, ids, passes.in_pieces[number]))
            on_pass(number)
        for accumulator, compared in zip(accumulators, _compared(predictions, ids), strict=True):
            accumulator.add_positions(compared)
    rows = torch.cat([batch.rows for batch in passes.batches])
    return [accumulator.result(rows) for accumulator in accumulators]


def _compared(predictions: Sequence[Predictions], ids: Tensor) -> list[Tensor]:
    """Every position [5, n, len - 1] of each of the predictions but the first, compared with those."""
    base, *others = predictions
    parts: list[list[Tensor]] = [[] for _ in others]
    for start, stop in pieces(base.model, ids):
        expected = base.logits(start, stop).float().log_softmax(-1)
        for part, other in zip(parts, others, strict=True):
            logits = other.logits(start, stop)
            part.append(compare_positions(expected, logits, ids[:, start + 1 : stop + 1]))
    return [torch.cat(part, dim=-1) for part in parts]


def plan_passes(models: Sequence[Any], tokens: Tokens) -> Passes:
    """How the tokens go through the models."""
    in_pieces = tuple(has_pieces(model, tokens.input_ids) for model in models)
    together = BATCH_TOKENS
    if not all(in_pieces):
        together = min(together, WHOLE_LOGITS // (len(models) * _vocabulary(models[0])))
    return Passes(tokens.batches(together), in_pieces)


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _histogram(values: Quantiles) -> Histogram:
    """How many of the values lie in which octave."""
    lowest, highest = OCTAVES
    edges = tuple(2.0**exponent for exponent in range(lowest, highest + 1))
    return Histogram(edges, tuple(values.octaves(lowest, highest)))


def _exp(loss: float) -> float:
    """The exponential, the largest number JSON can hold at most."""
    return float(np.exp(np.minimum(loss, MAX_LOG)))
