"""Sizes as people write them, and what the machine has."""

import pytest
import torch

from srcr import environment
from srcr.environment import (
    available_memory,
    format_bytes,
    format_megabytes,
    parse_size,
    peak_memory,
    release_memory,
    resident_memory,
    select_device,
    versions,
)
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
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["4", "4G", "GB", "-1GB", "0GB", "0.0000001KB", "1,5GB", "4 giga", "", "nanGB", "4GBs"]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError) as caught:
        parse_size(text)
    assert f"memory {text!r} is no size" in str(caught.value)
    assert "4GB, 500MB or 1.5GiB" in str(caught.value)


@pytest.mark.parametrize("size", [1, 999_999, 10**6, 10**6 + 1, 1_234_567_890])
def test_a_size_that_is_named_is_enough(size):
    assert size <= parse_size(format_megabytes(size)) < size + 10**6


def test_what_is_resident_grows_with_what_is_held_and_is_given_back():
    release_memory()  # what earlier tests left free, so that it is not what is measured
    before = resident_memory(CPU)
    held = torch.ones(50_000_000, dtype=torch.uint8)
    assert resident_memory(CPU) - before > 40_000_000
    assert peak_memory() >= resident_memory(CPU) * 0.99  # counted at other moments
    del held
    release_memory()  # a piece of the heap that was free may have been used, and is kept
    assert resident_memory(CPU) - before < 40_000_000
    assert available_memory(CPU) > 0


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (1.5e9, "1.50 GB")]
)
def test_sizes_for_people(size, text):
    assert format_bytes(size) == text


def test_devices():
    assert select_device("cpu") == CPU
    assert select_device("auto").type in ("cpu", "cuda")
    with pytest.raises(InputError, match="device 'tpu' is not known"):
        select_device("tpu")


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="torch sees no GPU"):
        select_device("cuda")


def test_versions_name_what_decides_the_result():
    known = versions()
    assert {"python", "srcr", "torch", "transformers", "safetensors"} <= known.keys()
    assert known["torch"].startswith(torch.__version__.split("+")[0])


def test_bfloat16_is_fast_by_the_flags_of_the_cpu(monkeypatch):
    ask = environment.multiplies_bfloat16.__wrapped__
    for flag, capability, expected in (
        (False, "AVX512", False), (True, "AVX2", False), (True, "AVX512", None),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda f=flag: f, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        onednn = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        assert ask() == (onednn if expected is None else expected)
