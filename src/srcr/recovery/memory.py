"""What training takes, and what to do where it does not fit."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from srcr.recovery.student import Student

#: What torch's allocator for CPUs says when the system refuses.
REFUSED = "can't allocate memory"
#: Numbers in float32 for each that is trained: itself, its gradient, two moments, and the best state so far.
PER_TRAINED = 5


class OutOfMemoryError(Exception):
    """Memory ran out on a device."""


@contextmanager
def noticed() -> Iterator[None]:
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


def training_memory(parameters: int, trained: int) -> int:
    """Bytes that training takes beside activations: teacher and student in float32, what is trained."""
    return 4 * (2 * parameters + PER_TRAINED * trained)


def trained_numbers(student: Student) -> int:
    """How many numbers of a student are trained."""
    latents = sum(latent.steps.numel() for latent in student.latents.values())
    return latents + sum(tensor.latent.numel() for tensor in student.plain.values())
