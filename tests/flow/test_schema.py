"""The JSON that commands print and write has the keys of the design, and no others (tests/schemas.py)."""

import json

import pytest
import torch
from safetensors.torch import save_file

from schemas import EVALUATION, INSPECTION, RUN, SEARCH, TABLE, check
from srcr.testing import save_tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model and token ids."""
    folder = tmp_path_factory.mktemp("schema")
    save_tiny_model(folder / "tiny", "llama")
    ids = torch.randint(0, 96, (48, 32), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, folder / "ids.safetensors")
    return folder


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_compression(srcr, place):
    options = ["--calibration", place / "ids.safetensors", "--sparsity", 0.25, "--json"]
    result = srcr("compress", place / "tiny", "-o", place / "small", *options)
    check(result.json(), RUN)
    assert result.json()["out"] == str(place / "small")
    check(read(place / "small/srcr.json"), RUN)
    exported = srcr("export", place / "small", "--format", "dense", "-o", place / "d", "--json")
    check(exported.json(), RUN)
    evaluated = srcr("evaluate", place / "tiny", place / "small", "--text", place / "ids.safetensors",
                     "--semantic", "--prompts", 8, "--prompt-len", 8, "--report", "--json")  # fmt: skip
    check(evaluated.json(), EVALUATION)
    check(read(place / "small/evaluation.json"), EVALUATION)


def test_tasks(srcr, tmp_path):
    options = ["--text", "bundled", "--samples", 2, "--seq-len", 32, "--tasks", "bundled"]
    result = srcr("evaluate", "bundled", "bundled", *options, "--limit", 5, "--json")
    assert result.code == 0, result.err
    check(result.json(), EVALUATION)
    assert result.json()["tasks"]
    assert result.json()["items"]


def test_a_table_and_a_search(srcr, place):
    options = ["--calibration", place / "ids.safetensors", "--samples", 16, "--sparsities", "0,0.5",
               "--widths", "3,4"]  # fmt: skip
    result = srcr("sensitivity", place / "tiny", "-o", place / "table.json", *options, "--json")
    check(result.json(), TABLE)
    assert result.json() == read(place / "table.json")
    target = ["--target", "tcr=0.8", "--trials", 4]
    result = srcr("search", place / "tiny", "-o", place / "best", *target, *options, "--json")
    assert result.code == 0, result.err
    check(result.json(), SEARCH)
    check(read(place / "best/search.json"), SEARCH)
    check(read(place / "best/evaluation.json"), EVALUATION)


def test_an_inspection(srcr, place):
    check(srcr("inspect", place / "tiny", "--json").json(), INSPECTION)
