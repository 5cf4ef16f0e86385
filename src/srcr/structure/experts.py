"""Which experts go: those that add least to what their layer gives.

The score of REAP (Lasby et al., arXiv 2510.13999) is the mean, over the tokens that are routed to an expert,
of its routing weight times the norm of its output. Summed over all tokens instead, it counts how often an
expert is chosen as well. Which of the two serves a model better is measured.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from srcr.models.blockwise import BlockwiseModel
from srcr.models.experts import experts_of, routing_of
from srcr.structure.depth import embedded, through

#: What an expert's contributions are averaged over: the tokens that are routed to it (REAP), or all.
Average = Literal["routed", "all"]
AVERAGES: tuple[Average, ...] = get_args(Average)
#: ``(block)``: passes through a block begin.
OnBlock = Callable[[int], None]


@torch.no_grad()
def expert_contributions(
    blocks: BlockwiseModel, batches: Sequence[Tensor], on_block: OnBlock
) -> dict[str, Tensor]:
    """For every module of experts by name, [experts, 2] float64: the sum over the tokens that are routed to
    each of its routing weight times the norm of its output, and how many tokens those are. ``batches``: token
    ids [n, len]."""
    states, arguments = embedded(blocks, batches)
    sums: dict[str, Tensor] = {}
    for index, block in enumerate(blocks.topology.blocks):
        on_block(index)
        module = blocks.block(index)
        for name, experts in experts_of(module).items():
            full = f"{block.name}.{name}"
            sums[full] = torch.zeros(experts.count, 2, dtype=torch.float64)
            for number, expert in enumerate(experts.experts()):
                hook = partial(_add, sums[full][number])
                expert.down_proj.register_forward_hook(hook)
        states = through(module, states, [each[index] for each in arguments])
    return sums


def _add(sums: Tensor, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    """Add what an expert gives for a batch to its ``sums`` [2]."""
    routing = routing_of(args[0])
    assert routing is not None
    norms = torch.linalg.vector_norm(output[: routing.count], dim=-1, dtype=torch.float32)
    weighed = float((norms * routing.gates.float().abs()).sum(dtype=torch.float64))
    sums += torch.tensor([weighed, routing.count], dtype=torch.float64)


def least_experts(
    contributions: Mapping[str, Tensor], count: int, average: Average, groups: int = 1
) -> dict[str, tuple[int, ...]]:
    """The ``count`` experts of each module with the smallest scores, by its name; as many of each of the
    ``groups`` of neighbours that its router chooses among first."""
    gone: dict[str, tuple[int, ...]] = {}
    for module, sums in contributions.items():
        tokens = sums[:, 1].clamp_min(1) if average == "routed" else sums[:, 1].sum()
        scores = (sums[:, 0] / tokens).view(groups, -1)
        least = torch.argsort(scores, stable=True)[:, : count // groups]
        first = torch.arange(groups)[:, None] * scores.shape[1]
        gone[module] = tuple(sorted((first + least).flatten().tolist()))
    return gone
