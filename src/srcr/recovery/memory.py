"""What training takes, and what to do where it does not fit."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from srcr.plans.recovery import Trained

#: What torch's allocator for CPUs says when the system refuses.
REFUSED = "can't allocate memory"
#: Bytes of a trained weight beside its numbers: its mask, and its code in the best state so far.
MASK_AND_CODE = 2


class OutOfMemoryError(Exception):
    """Memory ran out on a device."""


@contextmanager
def out_of_memory_raised() -> Iterator[None]:
    """Where memory runs out, on whatever device, one exception.

    Raises:
        OutOfMemoryError: it did.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError from error
    except RuntimeError as error:
        if REFUSED not in str(error):
            raise
        raise OutOfMemoryError from error


def training_memory(parameters: int, trained: int, train: Trained) -> int:
    """Bytes that training takes beside activations: teacher and student in float32; and of each of so many
    ``trained`` numbers of the linears the latent one, its gradient, and where it changes two moments."""
    per_trained = 4 if train == "codes" else 2
    return 4 * (2 * parameters + per_trained * trained) + MASK_AND_CODE * trained
