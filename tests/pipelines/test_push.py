"""srcr push: to a stand-in of the hub, with the hub's own library."""

import json
import shlex
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import torch
import yaml
from safetensors.torch import save_file

import srcr
from hub import TOKEN, in_place_of_the_hub
from srcr.errors import InputError, SrcrError
from srcr.pipelines.options import RunOptions
from srcr.report import write_results
from srcr.testing import save_tiny_model

CARD = "---\nlicense: apache-2.0\nlanguage:\n- en\ntags: [x]\n---\n# A model\n"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A compressed tiny model, evaluated, everything named by absolute paths."""
    place = tmp_path_factory.mktemp("secret place")
    base = save_tiny_model(place / "my: model #1", "llama")
    (base / "README.md").write_text(CARD, encoding="utf-8")
    ids = place / "ids.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file({"input_ids": torch.randint(0, 96, (8, 32), generator=generator)}, ids)
    recipe = srcr.Recipe(srcr.PruneSpec(sparsity=0.25), srcr.QuantSpec(num_bits=4))
    words = ["compress", base, "-o", place / "small", f"--calibration={ids}"]
    command = "srcr " + shlex.join(map(str, words))
    srcr.compress(
        str(base), str(place / "small"), recipe, str(ids), RunOptions(quiet=True, command=command)
    )
    text = srcr.EvaluationText(str(ids), 8, 32)
    results = srcr.evaluate(str(base), [str(place / "small")], text, options=RunOptions(quiet=True))
    write_results(results, None, True)
    return place / "small"


@pytest.fixture
def hub():
    """A hub on this machine."""
    with in_place_of_the_hub() as standing_in:
        yield standing_in


def test_nothing_that_was_written_names_a_place_of_this_machine(small):
    place = str(small.parent.parent)
    for path in small.rglob("*"):
        assert place.encode() not in path.read_bytes(), path.name
    record = json.loads((small / "srcr.json").read_text())
    assert record["base"] == "my: model #1"
    assert record["calibration"]["source"] == "ids.safetensors"
    assert "secret" not in record["command"]
    assert record["command"].startswith("srcr compress 'my: model #1' -o small --calibration=ids")


def test_the_card(small):
    _, header, text = (small / "README.md").read_text().split("---\n", 2)
    metadata = yaml.safe_load(header)
    assert metadata["license"] == "apache-2.0"
    assert metadata["language"] == ["en"]
    assert metadata["tags"] == ["srcr", "compressed-tensors", "pruning", "quantization"]
    (index,) = metadata["model-index"]
    metrics = [m["type"] for result in index["results"] for m in result["metrics"]]
    assert metrics == ["kl", "perplexity"]
    assert "Not measured yet" not in text
    assert "vllm serve" in text
    assert "arxiv.org/abs/2505.07289" in text


def test_the_command_puts_every_file_there(small, hub):
    command = [sys.executable, "-m", "srcr", "push", str(small), "org/small", "--private", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["url"] == f"{hub.url}/org/small"
    assert hub.private == {"org/small": True}
    here = {str(p.relative_to(small)): p.read_bytes() for p in small.rglob("*") if p.is_file()}
    assert hub.files["org/small"] == here
    assert set(record["files"]) == set(here)
    assert record["n_bytes"] == sum(map(len, here.values()))
    assert hub.commits == ["my: model #1, compressed by srcr"]


def test_one_that_exists_is_replaced_only_when_asked(small, hub):
    hub.files["org/small"] = {"README.md": b"mine", "notes.txt": b"mine too"}
    with pytest.raises(InputError, match="--overwrite"):
        srcr.push(small, "org/small", quiet=True)
    assert hub.files["org/small"]["README.md"] == b"mine"
    record = srcr.push(small, "org/small", overwrite=True, quiet=True)
    assert record.repo == "org/small"
    assert hub.files["org/small"]["notes.txt"] == b"mine too"
    assert hub.files["org/small"]["README.md"] == (small / "README.md").read_bytes()


def test_records_of_an_earlier_version_go_without_their_paths(small, hub, tmp_path):
    folder = shutil.copytree(small, tmp_path / "old")
    record = json.loads((folder / "srcr.json").read_text())
    record |= {"base": "/home/me/models/base", "command": "srcr compress /home/me/models/base"}
    (folder / "srcr.json").write_text(json.dumps(record))
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card + "Made with: `srcr compress /home/me/models/base`\n")
    srcr.push(folder, "org/old", quiet=True)
    assert not [name for name, data in hub.files["org/old"].items() if b"/home/me" in data]
    assert "/home/me" in (folder / "srcr.json").read_text()


@pytest.mark.parametrize(
    ("name", "token", "status", "message"),
    [
        ("org/small", "wrong", None, "HF_TOKEN"),
        ("org/small", TOKEN, 403, "HF_TOKEN"),
        ("org/small", TOKEN, 400, "did not take"),
        ("a/b/c", TOKEN, None, "no name of a repository"),
        ("org/-x", TOKEN, None, "no name of a repository"),
    ],
)
def test_what_is_refused(small, hub, monkeypatch, name, token, status, message):
    monkeypatch.setenv("HF_TOKEN", token)
    hub.status = status
    with pytest.raises(SrcrError, match=message):
        srcr.push(small, name, quiet=True)
    assert hub.files == {}


def test_a_commit_that_fails_says_what_is_there(small, hub):
    hub.full = True
    with pytest.raises(
        SrcrError, match=r"did not take org/small.*repository is there.*--overwrite"
    ):
        srcr.push(small, "org/small", quiet=True)
    hub.full = False
    srcr.push(small, "org/small", overwrite=True, quiet=True)
    assert hub.files["org/small"]


def test_folders_that_are_none(small, hub, tmp_path):
    with pytest.raises(InputError, match="no folder"):
        srcr.push(tmp_path / "none", "org/x", quiet=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no srcr\.json"):
        srcr.push(tmp_path / "empty", "org/x", quiet=True)
    linked = shutil.copytree(small, tmp_path / "linked")
    (linked / "notes.txt").symlink_to(small / "config.json")
    with pytest.raises(InputError, match="is a link"):
        srcr.push(linked, "org/x", quiet=True)
    unfinished = shutil.copytree(small, tmp_path / "unfinished")
    (unfinished / ".srcr-in-progress").write_text("")
    with pytest.raises(InputError, match="--resume"):
        srcr.push(unfinished, "org/x", quiet=True)
    assert hub.files == {}


def test_a_hub_that_is_not_there(small, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SrcrError, match="cannot be reached"):
        srcr.push(small, "org/x", quiet=True)
