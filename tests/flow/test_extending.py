"""docs/extending.md, followed to the letter: each recipe is a file and nothing else."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

from srcr import engines, formats, methods, transforms
from srcr.models.checkpoint import load_from, open_model
from srcr.testing import save_tiny_model

pytestmark = pytest.mark.slow

GUIDE = Path(__file__).parents[2] / "docs/extending.md"


def recipe(title):
    """(the name of the file, its text, what is run afterwards) of a section."""
    section = GUIDE.read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    name = re.search(r"`srcr/\w+/(\w+)\.py`", section)[1]
    code, *checks = re.findall(r"```python\n(.*?)```", section, re.S)
    return name, code, checks


@pytest.fixture
def follow(tmp_path, monkeypatch):
    """Write a recipe's file into a folder that is added to its package, and run what the recipe says."""

    def run(title, package):
        name, code, checks = recipe(title)
        folder = tmp_path / "own"
        folder.mkdir()
        (folder / f"{name}.py").write_text(code, encoding="utf-8")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
        monkeypatch.delitem(sys.modules, f"{package.__name__}.{name}", raising=False)
        importlib.invalidate_caches()
        names = {}
        for check in checks:
            exec(compile(check, str(GUIDE), "exec"), names)
        return names

    yield run
    for name in ("srcr.methods.obd", "srcr.formats.native_folder", "srcr.engines.upside_down",
                 "srcr.transforms.scale_logits"):  # fmt: skip
        sys.modules.pop(name, None)


def test_an_engine(follow, srcr, tmp_path):
    follow("An engine", engines)
    base = save_tiny_model(tmp_path / "tiny", "llama")
    result = srcr("verify", base, "--engines", "upside-down,transformers", "--json")
    assert result.code == 1
    outcomes = {check["engine"]: check["outcome"] for check in result.json()["checks"]}
    assert outcomes == {"upside-down": "differs", "transformers": "agrees"}


def test_a_pruner(follow, srcr, ids, tmp_path):
    follow("A pruner", methods)
    base = save_tiny_model(tmp_path / "tiny", "llama")
    result = srcr("compress", base, "-o", tmp_path / "out", "--calibration", ids,
                  "--prune-method", "obd", "--sparsity", 0.25, "--json")  # fmt: skip
    assert result.code == 0, result.err
    assert result.json()["rates"]["sparsity"] == pytest.approx(0.25, abs=1e-3)
    assert "LeCun" in srcr("methods").out


def test_a_format(follow, srcr, ids, tmp_path):
    follow("A format", formats)
    base = save_tiny_model(tmp_path / "tiny", "gpt2")
    out, dense = tmp_path / "out", tmp_path / "dense"
    result = srcr("compress", base, "-o", out, "--calibration", ids, "--sparsity", 0.25,
                  "--format", "native", "--json")  # fmt: skip
    assert result.code == 0, result.err
    assert result.json()["format"] == "native"
    assert srcr("export", out, "--format", "dense", "-o", dense).code == 0
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        logits = [formats.load(folder)(tokens).logits for folder in (out, dense)]
    assert torch.allclose(*logits, atol=1e-5)
    assert srcr("evaluate", base, out, "--text", ids).code == 0


def test_a_transform(follow):
    names = follow("A transform", transforms)
    tokens = torch.arange(3, 20)[None]
    base, doubled = open_model("bundled"), names["doubled"]
    with torch.no_grad():
        expected = 2 * base.loaded(torch.float32)(tokens).logits
        logits = load_from(doubled.source, torch.float32)(tokens).logits
    torch.testing.assert_close(logits, expected)
