"""The command as a process: it leaves with the right code, and says everything before it does."""

import subprocess
import sys

import pytest

ENDS = {
    "pass": 0,
    "raise SystemExit": 0,
    "raise SystemExit(3)": 3,
    "raise SystemExit('why')": 1,
    "raise ValueError('why')": 1,
}


@pytest.mark.parametrize(("end", "code"), ENDS.items())
def test_a_process_leaves_with_its_code_after_all_others(end, code):
    program = f"""
import atexit
from srcr.cli import process
def main():
    atexit.register(print, "let go")
    print("done")
    {end}
process.main = main
process.start()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == code
    assert done.stdout == "done\nlet go\n"
    assert ("why" in done.stderr) == ("why" in end)


@pytest.mark.parametrize("where", ["open_model", "load_tokens"])
def test_an_interrupt_says_what_is_left_and_leaves_with_130(
    where, srcr, tiny, tmp_path, monkeypatch
):
    """While the model is opened, and while text is read: nothing is written yet."""

    def interrupt(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"srcr.pipelines.opening.{where}", interrupt)
    result = srcr("compress", tiny, "-o", tmp_path / "out")
    assert result.code == 130
    assert result.error() == "error: interrupted; nothing was written"
    assert not (tmp_path / "out.partial").exists()


def test_without_a_command_help_is_shown(srcr):
    shown = srcr()
    assert shown.code == 0
    assert "Commands:" in shown.out
    assert srcr("-h").out == shown.out == srcr("--help").out
    assert srcr("--version").out.startswith("srcr ")
