"""What the tests of whole runs share: models, data, and the command line."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from srcr import cli
from srcr.testing import save_tiny_model

#: The program with a limit on the size of every file it writes: its first argument.
LIMITED = """
import resource, runpy, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
runpy.run_module("srcr", run_name="__main__")
"""


@dataclass(frozen=True)
class Result:
    """What a command left on the terminal."""

    code: int
    out: str
    err: str

    def json(self):
        """Standard output, which must be one JSON object and nothing else."""
        return json.loads(self.out)

    def error(self):
        """The one line that says what is wrong."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert self.err.rstrip().endswith(lines[0])
        assert "Traceback" not in self.err
        return lines[0]


@pytest.fixture
def srcr(monkeypatch, capsys):
    """Run a command in this process: the same entry point, without the seconds of imports."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["srcr", *map(str, args)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def srcr_process():
    """Run a command in a process of its own."""

    def run(*args, file_limit=None):
        command = [sys.executable, "-m", "srcr", *map(str, args)]
        if file_limit is not None:
            command[1:3] = ["-c", LIMITED, str(file_limit)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        return Result(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def saved_tiny(tmp_path_factory):
    """A tiny Llama, which no test changes."""
    return save_tiny_model(tmp_path_factory.mktemp("saved") / "tiny", "llama")


@pytest.fixture
def tiny(saved_tiny, tmp_path):
    """A tiny Llama."""
    return Path(shutil.copytree(saved_tiny, tmp_path / "tiny"))


@pytest.fixture
def ids(tmp_path):
    """A little calibration data for a tiny model."""
    path = tmp_path / "ids.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file({"input_ids": torch.randint(0, 96, (8, 32), generator=generator)}, path)
    return path
