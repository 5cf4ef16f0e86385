"""What a run has: versions, a device, memory, what files define; and sizes as people write them.

"Memory" is that of the device which computes: a process's resident memory on a CPU, what torch has
allocated on a GPU.
"""

import ctypes
import importlib
import os
import pkgutil
import platform
import re
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from srcr.errors import InputError

if TYPE_CHECKING:  # what only reads files does not wait for torch
    import torch

#: Packages that decide the result.
PACKAGES = ("srcr", "torch", "transformers", "compressed-tensors", "safetensors")
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT])(i?)B", re.IGNORECASE)
_POWERS = {"K": 1, "M": 2, "G": 3, "T": 4}


def versions() -> dict[str, str]:
    """Versions of what decides the result, by name."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = "not installed"
    return installed


def cache_folder() -> Path:
    """Where what can be made again is kept between runs: ``$SRCR_CACHE``, else ``srcr`` in the user's cache
    folder.

    Raises:
        RuntimeError: the user has no home.
    """
    own, xdg = os.environ.get("SRCR_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser()
    if xdg:
        return Path(xdg) / "srcr"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home()) / "srcr" / "cache"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "srcr"


def select_device(name: str) -> "torch.device":
    """The torch device called auto, cpu, cuda or, with a number, cuda:0, which becomes the current one.

    Raises:
        InputError: unknown, or there is no such device here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", name):
        raise InputError(f"device {name!r} is not known: use auto, cpu, cuda or cuda:0")
    kind, _, number = name.partition(":")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"device {name!r} was asked for, but torch sees no GPU here: use cpu or auto"
        )
    if number:
        if int(number) >= torch.cuda.device_count():
            raise InputError(
                f"device {name!r} was asked for, but torch sees {torch.cuda.device_count()} here: "
                f"use cuda:0 to cuda:{torch.cuda.device_count() - 1}"
            )
        torch.cuda.set_device(int(number))
    return torch.device(kind)


@cache
def multiplies_bfloat16() -> bool:
    """Whether torch multiplies bfloat16 on this CPU at full speed: by AVX-512 BF16 or AMX, unless
    ``ATEN_CPU_CAPABILITY`` or ``ONEDNN_MAX_CPU_ISA`` mask those."""
    import torch

    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    has = any(getattr(torch.cpu, name, lambda: False)() for name in names)
    masked = torch.backends.cpu.get_cpu_capability() != "AVX512"
    try:
        masked |= not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except AttributeError:  # a build without oneDNN
        masked = True
    return has and not masked


@cache
def cpu_name() -> str:
    """The processor's name as the system gives it."""
    return _cpu_fact("model name") or platform.processor() or platform.machine()


@cache
def is_intel() -> bool:
    """Whether the processor is Intel's: MKL has its best code for those alone."""
    return _cpu_fact("vendor_id") == "GenuineIntel"


def _cpu_fact(key: str) -> str:
    """What Linux knows of the first processor by this key; empty elsewhere."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith(key)).split(":", 1)[1].strip()
    return ""


def parse_size(text: str) -> int:
    """Bytes that ``text`` names: 4GB, 500MB, 1.5GiB.

    Raises:
        InputError: it is no such size, or zero.
    """
    match = _SIZE.fullmatch(text.strip())
    size = 0
    if match:
        base = 1024 if match[3] else 1000
        size = int(float(match[1]) * base ** _POWERS[match[2].upper()])
    if size < 1:
        raise InputError(
            f"memory {text!r} is no size: give a number above 0 and its unit, as 4GB, 500MB or 1.5GiB"
        )
    return size


def format_megabytes(size: float) -> str:
    """A size that :func:`parse_size` reads back to at least as many bytes."""
    return f"{-int(-size // 10**6)}MB"


def format_bytes(n_bytes: float) -> str:
    """Bytes in the unit people use."""
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.2f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.2f} GB"


def resident_memory(device: "torch.device") -> int:
    """Bytes in use now."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def peak_memory() -> int:
    """The most main memory in bytes that this process has had so far."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def available_memory(device: "torch.device") -> int:
    """Bytes that nobody uses, as far as can be known: within the limit of a container."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # "max" where there is no limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        free = min(free, max(0, limit - used))
    return free


def release_memory() -> None:
    """Give memory that is free back to the system, where its allocator would keep it (glibc)."""
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)


def definitions(package: str, path: tuple[str, ...], attribute: str) -> list[object]:
    """The ``attribute`` of each module of a ``package`` that has one, by the modules' names; ``path``: the
    folders that the package's modules lie in."""
    names = sorted(info.name for info in pkgutil.iter_modules(path))
    modules = [importlib.import_module(f"{package}.{name}") for name in names]
    return [getattr(module, attribute) for module in modules if hasattr(module, attribute)]
