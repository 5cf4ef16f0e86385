"""How far the compressed model's predictions are from the base model's, on the same text."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from srcr.errors import NumericalError
from srcr.metrics.intervals import ratio_interval
from srcr.types import Estimate


@dataclass(frozen=True)
class Divergence:
    """``kl``: mean KL(base || compressed) in nats over predicted tokens, ``kl_p99`` its 99th percentile
    over tokens; ``top1_agreement``: share of tokens where both rank the same one first; perplexities of
    the text's next tokens; ``n_tokens`` predicted positions (len - 1 a sequence)."""

    kl: Estimate
    kl_p99: float
    top1_agreement: Estimate
    base_perplexity: float
    perplexity: float
    n_tokens: int


@dataclass
class Accumulator:
    """Collects batch by batch; keeps one number a token (its KL), never logits."""

    kl: list[Tensor] = field(default_factory=list)
    agree: list[Tensor] = field(default_factory=list)
    base_loss: float = 0.0
    loss: float = 0.0

    def add(self, base_logits: Tensor, logits: Tensor, input_ids: Tensor) -> None:
        """Add a batch: logits [n, len, vocabulary] of both models for ``input_ids`` [n, len]."""
        target = input_ids[:, 1:, None]
        base = base_logits[:, :-1].float().log_softmax(-1)
        ours = logits[:, :-1].float().log_softmax(-1)
        self.base_loss -= float(base.gather(-1, target).sum(dtype=torch.float64))
        self.loss -= float(ours.gather(-1, target).sum(dtype=torch.float64))
        self.agree.append((base.argmax(-1) == ours.argmax(-1)).cpu())
        kl = (base.exp() * (base - ours)).sum(-1)
        self.kl.append(kl.cpu())

    def result(self) -> Divergence:
        """The figures over everything added.

        Raises:
            NumericalError: a model's predictions are not finite.
        """
        kl = torch.cat(self.kl).double().numpy()
        if not np.isfinite(kl).all():
            raise NumericalError("the models' predictions are not finite on this text")
        agree = torch.cat(self.agree).double().numpy()
        tokens = np.full(len(kl), kl.shape[1], dtype=np.float64)
        return Divergence(
            kl=ratio_interval(kl.sum(1), tokens),
            kl_p99=float(np.percentile(kl, 99)),
            top1_agreement=ratio_interval(agree.sum(1), tokens),
            base_perplexity=float(np.exp(self.base_loss / kl.size)),
            perplexity=float(np.exp(self.loss / kl.size)),
            n_tokens=int(kl.size),
        )
