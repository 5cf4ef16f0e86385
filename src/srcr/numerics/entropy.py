"""The bits a weight that storage can reach."""

import math

import torch
from torch import Tensor


def binary_entropy(share: float) -> float:
    """Bits to tell, for each element, whether it belongs to a part of ``share`` in [0, 1]."""
    return sum(-p * math.log2(p) for p in (share, 1 - share) if p > 0)


def code_entropy(codes: Tensor) -> float:
    """Zero-order entropy of integer ``codes`` (any shape) in bits an element: what an ideal entropy coder
    that takes codes as independent draws needs (Shannon 1948). Scales are not in it."""
    counts = torch.bincount(codes.reshape(-1).to(torch.int32) - int(codes.min()))
    odds = counts[counts > 0].double() / codes.numel()
    return max(0.0, float(-(odds * odds.log2()).sum()))


def sparse_entropy(sparsity: float, bits: float = 16) -> float:
    """Bits an element where a fraction ``sparsity`` is zero and the others are kept in ``bits`` as they
    are: the mask's entropy, and the kept ones."""
    return binary_entropy(sparsity) + (1 - sparsity) * bits
