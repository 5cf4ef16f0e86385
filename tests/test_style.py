"""The rules of docs/decisions/010 that no linter knows: sizes, and words that say nothing."""

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src/srcr"
FILES = sorted(SOURCE.rglob("*.py"))
MAX_FUNCTION, MAX_FILE, MAX_PARAMETERS = 60, 350, 7
#: Words that are no nouns of the field, alone or as the first part of a name.
VAGUE = re.compile(r"_*(found|one|some|said)(_|$)")
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path):
    return str(path.relative_to(SOURCE))


def is_exempt(path):
    """Kernels are as long as their loops; commands have as many parameters as the design gives them."""
    return "kernels" in path.parts


def functions(path):
    return [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, FUNCTIONS)]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_are_short(path):
    if is_exempt(path):
        pytest.skip("a kernel")
    assert len(path.read_text().splitlines()) <= MAX_FILE
    for function in functions(path):
        start = min([function.lineno, *(node.lineno for node in function.decorator_list)])
        assert function.end_lineno - start < MAX_FUNCTION, function.name


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_functions_have_few_parameters(path):
    if is_exempt(path) or "cli" in path.parts:
        pytest.skip("a kernel, or a command")
    for function in functions(path):
        arguments = function.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        assert len(every) <= MAX_PARAMETERS, function.name


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_names_are_nouns_of_the_field(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, FUNCTIONS | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.alias) and node.asname:
            names.add(node.asname)
    assert not [name for name in names if VAGUE.match(name)]


def test_nothing_lies_above_the_folders():
    """The top level holds the folders of the data flow and what every one of them uses."""
    files = {path.name for path in SOURCE.glob("*.py")}
    assert files == {"__init__.py", "__main__.py", "environment.py", "errors.py", "serialize.py"}


def test_the_map_shows_the_tree_as_it_is():
    text = (SOURCE.parents[1] / "docs/layout.md").read_text()
    folders = {p.name for p in SOURCE.iterdir() if p.is_dir() and list(p.glob("*.py"))}
    shown = set(re.findall(r"^\s+(\w+)/ ", text.partition("src/srcr/")[2], re.M))
    assert folders == shown & folders
    assert not [
        f for f in shown if not (SOURCE / f).is_dir() and not (SOURCE.parents[1] / f).is_dir()
    ]


def test_the_first_page_is_not_ragged():
    text = (SOURCE.parents[1] / "README.md").read_text()
    pictures = ("![", "[![")
    assert not [n for n, line in enumerate(text.splitlines(), 1)
                if len(line) > 110 and not line.startswith(pictures)]  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_that_unix_alone_has_is_imported_at_the_start(path):
    imported = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert not imported & {"fcntl", "grp", "pwd", "resource", "termios"}
