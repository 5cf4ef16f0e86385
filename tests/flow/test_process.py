"""The command as a process: it leaves with the right code, and says everything before it does."""

import os
import signal
import subprocess
import sys
import time

import pytest

from srcr.records.run import Rates, RunRecord
from srcr.records.text import TextRecord
from srcr.serialize import to_json

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


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "1000"), ({"OMP_WAIT_POLICY": "active"}, None), ({"GOMP_SPINCOUNT": "5"}, "5")],
)
def test_threads_wait_briefly_unless_the_user_says_how(given, spins):
    program = """
import os
from srcr.cli import process
process.main = lambda: print(os.environ.get("GOMP_SPINCOUNT"))
process.start()
"""
    others = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {k: v for k, v in os.environ.items() if k not in others} | given
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{spins}\n"


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


PROBE = """
import sys
from srcr.cli import process
sys.argv = ["srcr", *{args!r}]
try:
    process.main()
except SystemExit as ended:
    assert not ended.code, ended.code
print(sorted({{"torch", "transformers", "numpy"}} & sys.modules.keys()))
"""


@pytest.mark.parametrize("command", ["-h", "compress -h", "methods", "report SMALL -o page.html"])
def test_what_computes_nothing_starts_without_torch(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    rates = Rates(0.25, 4, 0.8125, 0.26, 100, 40, 40, "vllm", "srcr.json")
    text = TextRecord("self", 8, 32, "0" * 64)
    record = RunRecord("b", "0", "c", "compressed-tensors", rates, "0", text, (), {}, 1.0, 1)
    (tmp_path / "small/srcr.json").write_text(to_json(record))
    args = command.replace("SMALL", "small").split()
    program = PROBE.format(args=args)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_an_interrupted_process_leaves_with_130(tiny, tmp_path):
    """A signal while the model writes its text, which would take minutes. (Behind a shell's ``&`` it would be
    ignored, were it not set anew.)"""
    command = [
        sys.executable, "-m", "srcr", "compress", str(tiny), "-o", str(tmp_path / "out"),
        "--samples", "20000", "--no-cache",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    for line in process.stderr:
        if line.startswith("check"):
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "error: interrupted; nothing was written"
    assert not list(tmp_path.glob("out*"))
