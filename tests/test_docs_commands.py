"""The commands of the README and the docs, run one after the other, as a reader types them, a folder a page.

A small budget stands in for what would take minutes; what cannot run here is named, with the reason.
"""

import json
import re
import shutil
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from documents import PAGES, ROOT, commands, fenced, words_of
from hub import in_place_of_the_hub
from srcr.cli import process
from srcr.models.checkpoint import open_model

#: What stands for a reader's own model, folder or repository.
NAMES = {
    "MODEL": "model", "BASE": "model", "DIR": "small", "F": "dense", "REPO": "name/small",
}  # fmt: skip
TEXT = {"--samples": "8", "--seq-len": "32"}
CALIBRATION = {"--calibration": "bundled"} | TEXT
LEVELS = {"--sparsities": "0,0.25", "--widths": "3,4"}
#: Options of each command that are given where the page leaves them to their defaults.
SMALLER = {
    "compress": CALIBRATION,
    "evaluate": {"--text": "bundled"} | TEXT,
    "search": CALIBRATION | LEVELS,
    "sensitivity": CALIBRATION | LEVELS,
    "plan": CALIBRATION | LEVELS | {"-o": "plan.yaml"},
    "recover": CALIBRATION | {"--held-out": "bundled", "--minutes": "0.02"},
}
#: Values that stand in for those of the page: texts that a semantic search writes and compares take long.
INSTEAD = {
    "--trials": "6", "--minutes": "0.02", "--recover": "2steps", "--limit": "10",
    "stored=60MB": "stored=0.62MB", "stored=40MB": "stored=0.62MB",
    "semantic>=0.98": "kl<=0.5",
}  # fmt: skip
#: Commands that are parsed only (tests/test_docs.py), by why they do not run here.
PARSED = {
    "models of the hub, of 7 to 47 billion parameters": [
        "srcr compress Qwen/Qwen3-30B-A3B -o small --bits 4",
        "srcr compress mistralai/Mixtral-8x7B-v0.1 -o small --bits 4 --sparsity 0.25",
        "srcr compress allenai/OLMoE-1B-7B-0924 -o small --remove experts=0.25 --bits 4",
    ],
    "the bundled model's tokenizer is none of llama.cpp's (tests/formats/test_gguf.py writes such files)": [
        "srcr compress MODEL -o phone --bits 4 --embeddings 8 --format gguf",
        "srcr verify phone",
        "srcr export small --format gguf -o small-gguf",
        "srcr compress MODEL -o small-gguf --format gguf",
    ],
    "vLLM is not installed": ["srcr verify small --engines vllm"],
    "parts of a command in running text": [
        "srcr search --target stored=...",
        "srcr search --remove experts=0.25",
        "srcr compress --plan",
        "srcr evaluate -o",
        "srcr evaluate --report",
        "srcr evaluate -o FILE",
        "srcr export OUT --format compressed-tensors",
        "srcr COMMAND -h",
    ],
    "a format that the reader adds (tests/flow/test_extending.py does)": [
        "srcr compress --format native",
        "srcr export DIR --format native",
    ],
    "it writes into the shell's own files": ["srcr --install-completion"],
}
NOT_RUN = {line for lines in PARSED.values() for line in lines}
#: Where a command needs a graphics card.
CUDA = "--device cuda"
#: A form of a command, with brackets, bars or dots in it: parsed only, too.
SYNOPSIS = re.compile(r"\[|\||\.\.\. --")
README = ROOT / "README.md"
NEEDED = [page for page in PAGES if commands(page)]


def runs(line):
    """Whether a command runs here."""
    if CUDA in line and not torch.cuda.is_available():
        return False
    return not SYNOPSIS.search(line) and line not in NOT_RUN


def in_order(page):
    """The commands of a page that run, in their order, those in the text behind those in blocks; those of
    the README run once."""
    before = commands(README) if page != README else []
    return [line for line in commands(page) if runs(line) and line not in before]


def affordable(line, folder):
    """The words of a command, for the bundled model and a small budget."""
    words = [NAMES.get(word, word) for word in words_of(line)]
    for place, word in enumerate(words):
        if word in INSTEAD:
            if word.startswith("--"):
                words[place + 1] = INSTEAD[word]
            else:
                words[place] = INSTEAD[word]
    for option, value in SMALLER.get(words[0], {}).items():
        if option not in words and not (option == "--minutes" and "--steps" in words):
            words += [option, value]
    if "--semantic" in words:
        words += ["--prompts", "4", "--new-tokens", "8"]
    out = words[words.index("-o") + 1] if "-o" in words else None
    if out and (folder / out).exists() and "--resume" not in words:
        words.append("--overwrite")
    return words


@pytest.fixture
def hub():
    """What stands in for the hub."""
    with in_place_of_the_hub() as standing_in:
        yield standing_in


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs a command in a folder."""
    monkeypatch.chdir(tmp_path)

    def run_words(words):
        monkeypatch.setattr(sys, "argv", ["srcr", *words])
        code = None
        try:
            process.main()
        except SystemExit as end:
            code = end.code
        assert not code, f"{' '.join(words)}: {capsys.readouterr().err}"

    return run_words


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """Three layers of the bundled model."""
    folder = tmp_path_factory.mktemp("shallow")
    opened = open_model("bundled")
    opened.tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(opened.folder)
    model.model.layers = model.model.layers[:3]
    model.config.num_hidden_layers = 3
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def readers_files(tmp_path, shallow):
    """What a reader has who comes from another page."""
    texts = [{"text": f"The cat number {n} sat on mat number {n % 7}."} for n in range(400)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    shutil.copytree(shallow, tmp_path / "model")
    (tmp_path / "run.yaml").write_text("bits: 3\ngroup_size: 32\n")


@pytest.mark.slow
@pytest.mark.parametrize("page", NEEDED, ids=lambda page: page.name)
def test_the_commands_of_a_page(page, tmp_path, run, hub, readers_files):
    lines = in_order(page)
    if not lines:
        pytest.skip("forms and parts of commands alone")
    if not re.search(r"-o small( |$)", lines[0]) and page.name != "tutorial.md":
        run(affordable("srcr compress MODEL -o small", tmp_path))
    for line in lines:
        run(affordable(line, tmp_path))
    if page.name == "tutorial.md":
        assert (tmp_path / "small/report.html").is_file()
        assert (tmp_path / "both.html").is_file()
        assert (tmp_path / "best/search.json").is_file()
        assert hub.private == {"NAME/small-model": True}


def test_what_is_not_run_is_on_a_page():
    every = {line for page in PAGES for line in commands(page)}
    assert every >= NOT_RUN
    tutorial = next(page for page in PAGES if page.name == "tutorial.md")
    typed = [line for line in fenced(tutorial.read_text()) if line.startswith("srcr ")]
    assert [line for line in in_order(tutorial) if line in typed] == typed, "all of it, in order"
