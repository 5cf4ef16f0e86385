"""The loop over decoder blocks.

Compression, sensitivity and blockwise recovery are all *visits*: functions that are handed a block,
ask for the statistics they need, and may replace weights. Two streams of activations run side by side,
through the dense blocks and through the modified ones, so that each layer is solved for the inputs it
will really see, against the outputs the dense model would have given.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TypeVar

import torch
from torch import Tensor

from srcr.engine.activations import ActivationFile, HiddenStates
from srcr.engine.block import BlockPair
from srcr.engine.memory import MemoryPolicy
from srcr.models.blockwise import BlockSource

R = TypeVar("R")
Visit = Callable[[BlockPair], R]
#: ``(block, name)``: the forward passes behind block number ``block`` begin.
OnAdvance = Callable[[int], None]


@torch.no_grad()
def walk(
    source: BlockSource,
    batches: Sequence[Tensor],
    visit: Visit[R],
    on_advance: OnAdvance,
    dense_batches: int | None = None,
    policy: MemoryPolicy = MemoryPolicy(),
    dense_source: BlockSource | None = None,
) -> Iterator[R]:
    """Visit every decoder block in order and yield what each visit returns.

    ``batches`` are token ids [n, len]. Inputs of the first block are computed once; after a visit the
    modified block runs on so that later blocks see what it really gives. Dense blocks run beside them on
    ``dense_batches`` of the batches, from all over (None: on all); without any, no visit may ask for cross
    moments. ``policy`` trades memory for time and disk. ``dense_source``: the model whose embedding the
    dense blocks' inputs come from (None: the same).
    """
    dense = len(batches) if dense_batches is None else min(dense_batches, len(batches))
    with ExitStack() as stack:

        def states() -> HiddenStates:
            if policy.activation_folder is None:
                return []
            return stack.enter_context(ActivationFile(policy.activation_folder, source.device))

        streams = (states() if dense else None, states())
        arguments = []
        ordered = _dense_first(batches, dense)
        shared = dense_source is None or dense_source is source
        for number, (hidden, others) in enumerate(source.embed(ordered)):
            arguments.append(others)
            streams[1].append(hidden)
            if shared and streams[0] is not None and number < dense:
                streams[0].append(hidden)
        if dense_source is not None and not shared and streams[0] is not None:
            for hidden, _ in dense_source.embed(ordered[:dense]):
                streams[0].append(hidden)
        count = len(source.topology.blocks)
        for index in range(count):
            pair = BlockPair(source, index, streams, arguments, policy)
            result = visit(pair)
            if index + 1 < count:
                on_advance(index)
                pair.advance()
            del pair  # and with it a block's weights and activations, before the next one is loaded
            policy.tidy()
            yield result


def _dense_first(batches: Sequence[Tensor], first: int) -> list[Tensor]:
    """The same batches, so ordered that the ``first`` so many come from all over."""
    chosen = {i * len(batches) // first for i in range(first)}
    return [batches[i] for i in sorted(range(len(batches)), key=lambda i: i not in chosen)]
