"""Sizes as people write them, and what the machine has."""

import pytest
import torch

from srcr import memory
from srcr.errors import InputError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4 * 10**9),
        ("500MB", 500 * 10**6),
        ("1.5GiB", 3 * 2**29),
        ("2 tb", 2 * 10**12),
        (" 64KiB ", 65536),
    ],
)
def test_sizes(text, size):
    assert memory.parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["4", "4G", "GB", "-1GB", "0GB", "0.0000001KB", "1,5GB", "4 giga", "", "nanGB", "4GBs"]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError) as caught:
        memory.parse_size(text)
    assert f"memory {text!r} is no size" in str(caught.value)
    assert "4GB, 500MB or 1.5GiB" in str(caught.value)


@pytest.mark.parametrize("size", [1, 999_999, 10**6, 10**6 + 1, 1_234_567_890])
def test_a_size_that_is_named_is_enough(size):
    assert size <= memory.parse_size(memory.readable(size)) < size + 10**6


def test_what_is_resident_grows_with_what_is_held_and_is_given_back():
    memory.release()  # what earlier tests left free, so that it is not what is measured
    before = memory.resident(CPU)
    held = torch.ones(50_000_000, dtype=torch.uint8)
    assert memory.resident(CPU) - before > 40_000_000
    assert memory.peak() >= memory.resident(CPU) * 0.99  # counted at other moments
    del held
    memory.release()  # a piece of the heap that was free may have been used, and is kept
    assert memory.resident(CPU) - before < 40_000_000
    assert memory.available(CPU) > 0
