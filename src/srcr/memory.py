"""How much memory a run may take, how much it takes, and sizes as people write them.

"Memory" is that of the device which computes: a process's resident memory on a CPU, what torch has
allocated on a GPU.
"""

import ctypes
import os
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

from srcr.errors import InputError

#: Share of the memory that is free when a run begins that it may take by default.
DEFAULT_SHARE = 0.5
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT])(i?)B", re.IGNORECASE)
_POWERS = {"K": 1, "M": 2, "G": 3, "T": 4}


def parse_size(text: str) -> int:
    """Bytes that ``text`` names: 4GB, 500MB, 1.5GiB.

    Raises:
        InputError: it is no such size, or zero.
    """
    found = _SIZE.fullmatch(text.strip())
    size = 0
    if found:
        base = 1024 if found[3] else 1000
        size = int(float(found[1]) * base ** _POWERS[found[2].upper()])
    if size < 1:
        raise InputError(
            f"memory {text!r} is no size: give a number above 0 and its unit, as 4GB, 500MB or 1.5GiB"
        )
    return size


def readable(size: float) -> str:
    """A size that :func:`parse_size` reads back to at least as many bytes."""
    return f"{-int(-size // 10**6)}MB"


def resident(device: torch.device) -> int:
    """Bytes in use now."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    with suppress(OSError):
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    return peak()


def peak() -> int:
    """The most main memory that this process has had so far, in bytes."""
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * 1024


def available(device: torch.device) -> int:
    """Bytes that nobody uses, as far as that can be found out: within the limit of a container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        found = int(line.split()[1]) * 1024
    with suppress(OSError, ValueError):  # "max" where there is no limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        found = min(found, max(0, limit - used))
    return found


def release() -> None:
    """Give memory that is free back to the system, where its allocator would keep it (glibc)."""
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
