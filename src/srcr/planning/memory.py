"""What a search needs in memory, estimated from shapes, and how it fits into a budget.

Results do not depend on the budget: it decides what is held rather than computed again, and how many
finalists are evaluated together.
"""

from dataclasses import dataclass

import torch

from srcr.data.sampling import sampling_memory
from srcr.environment import (
    available_memory,
    format_megabytes,
    parse_size,
    release_memory,
    resident_memory,
)
from srcr.errors import InputError
from srcr.models.checkpoint import OpenModel
from srcr.numerics.kernels.dispatch import kernels_for

FLOAT = 4
#: Tensors of the size of a batch's logits that are alive at once: logits and log probabilities of two models,
#: and three that their divergence is computed in.
LOGITS_ALIVE = 7
#: The same of the widest activations of a forward pass: a layer's input, its output, and two in between.
ACTIVATIONS_ALIVE = 4
#: Share of the memory that is free which a search takes where no budget is given, as ``compress`` does.
DEFAULT_SHARE = 0.5
#: What allocators and libraries come to keep besides: 130 MB were measured on models of 2 and of 75 million
#: parameters.
SLACK = 150_000_000


@dataclass(frozen=True)
class SearchMemory:
    """Bytes beside what the process has. ``base``: the base in float32, held throughout; ``writing``: the
    text, where the model itself writes it; ``measuring``: the weights of a candidate that are not the base's,
    and a batch of the search text; ``compressing``: a finalist, a block at a time; ``finalist``: one in
    float32; ``evaluating``: a batch of the evaluation, or what loading a finalist takes on the way."""

    base: int
    writing: int
    measuring: int
    compressing: int
    finalist: int
    evaluating: int

    @property
    def smallest(self) -> int:
        """What a search takes at least: a finalist at a time."""
        evaluating = self.finalist + self.evaluating
        return self.base + SLACK + max(self.writing, self.measuring, self.compressing, evaluating)


@dataclass(frozen=True)
class SearchPolicy:
    """``cache_bytes`` that measuring may hold of each thing that it could compute again, and how many
    ``finalists`` are evaluated together."""

    cache_bytes: int
    finalists: int


@dataclass(frozen=True)
class TextShape:
    """How much text goes through a model: sequences of ``length`` tokens, which the model writes itself in a
    precision (``writing``; None: it does not), and of which ``measured`` and ``evaluated`` are a batch of the
    search and of the evaluation."""

    length: int
    writing: torch.dtype | None
    measured: int
    evaluated: int


def estimate_search_memory(opened: OpenModel, text: TextShape, compressing: int) -> SearchMemory:
    """An estimate for a model, where compressing a block takes ``compressing`` bytes."""
    shapes = opened.topology.shapes.values()
    linears = sum(rows * cols for rows, cols in shapes)
    widest = max(max(shape) for shape in shapes)
    parameters = opened.parameters
    a_token = FLOAT * (LOGITS_ALIVE * opened.vocabulary + ACTIVATIONS_ALIVE * widest)
    measured, evaluated = (text.length * n for n in (text.measured, text.evaluated))
    return SearchMemory(
        base=FLOAT * parameters,
        writing=_writing_memory(opened, text),
        measuring=FLOAT * linears + a_token * measured,
        compressing=compressing,
        finalist=FLOAT * parameters,
        # A checkpoint is read in its own precision before it is float32, packed codes beside it.
        evaluating=max(2 * opened.dtype.itemsize * parameters, a_token * evaluated),
    )


def _writing_memory(opened: OpenModel, text: TextShape) -> int:
    """What writing a batch of text takes beside the base in float32."""
    precision = text.writing
    if precision is None:
        return 0
    model = 0 if precision == torch.float32 else precision.itemsize * opened.parameters
    return model + sampling_memory(opened.config, opened.vocabulary, text.length, precision)


def choose_search_policy(
    need: SearchMemory, memory: str | None, device: torch.device, cache_bytes: int, finalists: int
) -> tuple[SearchPolicy, str | None]:
    """What a budget leaves (None: a share of what is free) for caches of at most ``cache_bytes`` each and for
    at most so many ``finalists`` together; and a note where it should be said aloud.

    Raises:
        InputError: the budget cannot be met; it names the smallest that can.
    """
    kernels_for(device)  # compiled code is part of what the process has before
    release_memory()
    resident, free = resident_memory(device), available_memory(device)
    budget = None if memory is None else parse_size(memory)
    limit = resident + int(DEFAULT_SHARE * free) if budget is None else budget
    if resident + need.smallest > limit:
        if budget is not None:
            raise InputError(
                f"--memory {format_megabytes(budget)} is too little for this search: with "
                f"{format_megabytes(resident)} for the program, the base in float32 takes "
                f"{format_megabytes(need.base)} and a step beside it "
                f"{format_megabytes(need.smallest - need.base)}; use at least "
                f"{format_megabytes(1.02 * (resident + need.smallest))}"
            )
        return SearchPolicy(0, 1), (
            f"this takes about {format_megabytes(resident + need.smallest)} of memory, and "
            f"{format_megabytes(free)} are free: it may fail"
        )
    left = limit - resident - need.base - SLACK
    together = (left - need.evaluating) // max(1, need.finalist)
    cached = min(cache_bytes, (left - need.measuring) // 3)
    return SearchPolicy(cached, max(1, min(finalists, together))), None
