"""What older versions of compressed-tensors take is still what srcr writes: golden files, by version, of
benchmarks/loading_compressed_tensors.py, which let each version read the checkpoints."""

import json
from pathlib import Path

import pytest
import torch

from srcr.formats import get_format
from srcr.formats.checkpoint import Contents, Scheme
from srcr.formats.compressed_tensors import quantization_config
from srcr.models.checkpoint import open_model
from srcr.testing import tiny_model

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.json"))
DOWN = "model.layers.0.mlp.down_proj"
MIXED = "4 bits beside 8, symmetric, groups of 16"


def contents(name):
    """What a checkpoint of that name holds: "3 bits, zero-points, whole rows"."""
    opened = open_model(tiny_model("llama", torch.bfloat16))
    linears = list(opened.topology.linears())
    scheme = Scheme(int(name[0]), 16 if "groups of 16" in name else -1, "symmetric" in name)
    schemes = dict.fromkeys(linears, scheme)
    if name == MIXED:
        schemes = {linear: Scheme(4 if linear == DOWN else 8, 16, True) for linear in linears}
    return Contents(opened.topology, opened.config, schemes, tuple(linears))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_a_version_takes_what_is_written(path):
    taken = json.loads(path.read_text())
    assert {"2 bits, symmetric, whole rows", "4 bits, symmetric, groups of 16", MIXED} <= set(taken)
    for name, config in taken.items():
        assert quantization_config(contents(name)) == config, name


def test_widths_that_older_versions_read_wrong_are_said_aloud():
    for bits in range(2, 9):
        given = " ".join(
            get_format("compressed-tensors").notes(contents(f"{bits} bits, symmetric, whole rows"))
        )
        assert ("older versions read other weights" in given) == (bits in (3, 5, 6, 7))
