"""What is published: a wheel that runs where it is installed, and a source archive that has everything."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
import yaml

import srcr

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The project's files, where a build may leave its own."""
    left_out = shutil.ignore_patterns(".*", "build", "dist", "out", "*.egg-info", "__pycache__")
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("package") / "srcr", ignore=left_out)


def run(*command, **options):
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=600, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_runs_where_it_is_installed(tree, tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    # With the setuptools that is here, where there is one: no index is asked then.
    here = ["--no-build-isolation"] if importlib.util.find_spec("setuptools") else []
    run(*pip, "wheel", "--no-deps", *here, "--wheel-dir", tmp_path, tree)
    (wheel,) = tmp_path.glob("srcr-*.whl")
    place = tmp_path / "installed"
    run(*pip, "install", "--no-deps", "--no-index", "--target", place, wheel)
    environment = os.environ | {"PYTHONPATH": str(place)}
    code = "import srcr; print(srcr.__file__, srcr.inspect('bundled').architecture)"
    out = run(sys.executable, "-c", code, cwd=tmp_path, env=environment)
    assert out.split() == [str(place / "srcr/__init__.py"), "LlamaForCausalLM"]
    listed = run(place / "bin/srcr", "methods", cwd=tmp_path, env=environment)
    assert "sparsegpt" in listed
    assert (place / "srcr/py.typed").is_file()
    assert (place / "srcr/report/plotly-basic.min.js").is_file()
    (metadata,) = place.glob("srcr-*.dist-info/METADATA")
    assert "Classifier: Operating System :: POSIX :: Linux" in metadata.read_text()


@pytest.mark.slow
def test_the_source_archive_has_tests_docs_and_examples(tree, tmp_path):
    pytest.importorskip("setuptools")
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    run(sys.executable, "-c", code, cwd=tree)
    (archive,) = tmp_path.glob("srcr-*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert names >= {
        "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md",
        "Makefile", "constraints.txt", "mkdocs.yml", "tests/test_package.py", "docs/usage.md",
        "docs/images/bytes.svg", "examples/first_steps.ipynb", "benchmarks/real.py",
        "src/srcr/bundled/model/config.json",
    }  # fmt: skip
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


def test_the_metadata_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project["version"] == srcr.__version__
    assert citation["license"] == project["license"]
    assert citation["preferred-citation"]["url"].endswith("2505.07289")


def test_every_extra_is_in_the_development_environment_or_says_why_not():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    developed = set(extras.pop("dev"))
    assert {need for needs in extras.values() for need in needs} <= developed


def test_every_extra_and_what_it_needs_is_pinned():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    named = {
        need.partition(">")[0].partition("[")[0].partition(";")[0].strip().lower().replace("_", "-")
        for needs in extras.values()
        for need in needs
    }
    assert named <= pinned
