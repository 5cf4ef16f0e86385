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
