"""The README and the docs: every command is there, the site builds, and what is drawn is as it says."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest
import typer

from documents import PAGES, ROOT, commands, fenced, words_of
from srcr.cli import process
from srcr.engines import engines

COMMANDS = typer.main.get_command(process.app)


def parse(words):
    """Parse as the command line does, up to the values."""
    command = COMMANDS.commands[words[0]]
    context = command.context_class(command, info_name=words[0])
    _, left, _ = command.make_parser(context).parse_args(list(words[1:]))
    assert not left, f"not taken: {left}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_option_is_there(page):
    for line in commands(page):
        words = words_of(line)
        if words[0].startswith("-"):  # of the program itself
            assert words[0] in {flag for option in COMMANDS.params for flag in option.opts} | {"-h"}
            continue
        if words == ["COMMAND", "-h"]:
            continue
        assert words[0] in COMMANDS.commands, line
        if line.endswith(("-o", "--plan")):  # what the text goes on about
            words.append("FILE")
        try:
            parse(words)
        except Exception as error:
            raise AssertionError(f"{page.name}: {line}: {error}") from None


def test_what_is_no_command_is_noticed():
    with pytest.raises(Exception, match="--nonsense"):
        parse(["compress", "bundled", "--nonsense"])
    assert words_of("srcr evaluate BASE OUT... [-o report.json] [options]  # so") == [
        "evaluate", "BASE", "OUT", "-o", "report.json"
    ]  # fmt: skip
    assert len(commands(ROOT / "docs/usage.md")) > 8
    assert len(commands(ROOT / "README.md")) > 4


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_of_pages_outside_the_site(name):
    """Those of the site's own pages its build checks."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / name).read_text(encoding="utf-8"))
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_make_targets_of_the_docs_are_there():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        for line in fenced(page.read_text(encoding="utf-8")):
            if line.startswith("make "):
                assert line.split()[1] in targets, f"{page.name}: {line}"


@pytest.mark.slow
def test_the_site_builds_strictly_and_asks_for_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'srcr[docs]'")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.findall(
            r"<(?:script|link|img)[^>]+(?:src|href)=\"?https?://[^\"> ]+", text
        ), page
    reference = (tmp_path / "api/index.html").read_text(encoding="utf-8")
    assert "srcr.pipelines.compress.compress" in reference
    assert ":class:" not in reference


def test_the_reference_has_every_public_name():
    import srcr

    named = {line.rpartition(".")[2] for line in (ROOT / "docs/api.md").read_text().splitlines()
             if line.startswith("::: ")}  # fmt: skip
    assert named == set(srcr.__all__) - {"__version__"}


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_of_figures_that_the_log_has():
    plot = script("plot_readme")
    figures = json.loads(plot.FIGURES.read_text())["files"]
    assert plot.picture(figures) == plot.PICTURE.read_text(encoding="utf-8")
    log = (ROOT / "docs/log.md").read_text(encoding="utf-8")
    for file in figures:
        row = next(line for line in log.splitlines() if f"{file['megabytes']}" in line
                   and f"{file['kl']:.4f}" in line.replace("**", ""))  # fmt: skip
        assert f"± {file['error']:.4f}" in row


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_the_table_of_support_is_what_comes_of_it(family, tmp_path):
    if engines()["llama.cpp"].unavailable():
        pytest.skip("llama.cpp is not here: one of the engines that the table asks")
    table = script("support_table")
    lines = table.PAGE.read_text(encoding="utf-8").splitlines()
    assert table.row(family, tmp_path) in lines, "run python scripts/support_table.py"
