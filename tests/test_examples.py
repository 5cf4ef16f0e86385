"""Every example runs, and so does the notebook, on the bundled model or a tiny one."""

import importlib.util
import json
from pathlib import Path

import pytest

from srcr.engines import engines
from srcr.testing import save_tiny_model

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"
#: A tiny model whose widths the blocks of GGUF divide.
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32}  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run an example in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def example(name, *args):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main(*args)

    return example


def test_compress_and_load(run, capsys):
    run("compress_and_load")
    assert "MB became" in capsys.readouterr().out


def test_own_texts(run, capsys):
    run("own_texts")
    out = capsys.readouterr().out
    assert "TCr 0.8125" in out
    assert "95 % interval" in out


def test_search_to_size(run, tmp_path, capsys):
    model = save_tiny_model(tmp_path / "tiny", "llama", **WIDE)
    run("search_to_size", str(model), "0.32")
    assert "chosen: " in capsys.readouterr().out
    assert (tmp_path / "small-searched/search.json").is_file()


def test_llama_cpp(run, tmp_path, capsys):
    pytest.importorskip("gguf")
    model = save_tiny_model(tmp_path / "tiny", "llama", **WIDE)
    run("llama_cpp", str(model))
    outcome = "skipped" if engines()["llama.cpp"].unavailable() else "agrees"
    assert f"llama.cpp: {outcome}" in capsys.readouterr().out


def test_the_notebook(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((EXAMPLES / "first_steps.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    names = {}
    for number, cell in enumerate(notebook["cells"]):
        assert cell["cell_type"] in ("markdown", "code")
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "the notebook is kept without outputs"
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert names["evaluation"].divergence.kl.value < 0.05
    assert names["record"].rates.stored_bytes < names["record"].rates.base_bytes / 2


def test_every_example_is_here():
    here = {path.stem for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert here == {"compress_and_load", "own_texts", "search_to_size", "llama_cpp", "first_steps"}
