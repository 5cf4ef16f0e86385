import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from srcr.errors import InputError
from srcr.planning.candidates import Measured
from srcr.planning.levels import Decision, Level
from srcr.planning.trials import Trials

UNITS = (Decision(("a.q", "a.k")), Decision(("a.o",)))
CHOICES = [(Level(0.25, bits), Level(1 / 3, 4)) for bits in (2, 3, 4, 5)] + [(None, Level(0, 8))]

WORKER = """
import sys, time
from srcr.planning.candidates import Measured
from srcr.planning.trials import Trials
sys.path.insert(0, sys.argv[2])
from test_trials import CHOICES, UNITS
trials = Trials(sys.argv[1], "shared", "f", UNITS)
def slow(choices):
    for choice in choices:
        print("measured", CHOICES.index(choice), flush=True)
        time.sleep(float(sys.argv[3]))
        yield Measured(float(CHOICES.index(choice)))
print([m.kl for m in trials.measure(CHOICES, slow)])
"""


def value(choices):
    return [
        Measured(float(CHOICES.index(choice)), whole=choice[0] is not None) for choice in choices
    ]


def never(choices):
    assert not choices
    return []


def start(storage, seconds):
    command = [sys.executable, "-c", WORKER, storage, str(Path(__file__).parent), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def sqlite(tmp_path):
    return f"sqlite:///{tmp_path}/study.db"


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory):
    """A server of its own, on a socket in a folder."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    pytest.importorskip("psycopg")
    folder = tmp_path_factory.mktemp("postgresql")
    control, data = found[-1].with_name("pg_ctl"), folder / "data"
    become = []
    if os.getuid() == 0:  # it does not run as root
        shutil.chown(folder, "postgres")
        for path in (folder, *folder.parents):
            if path.stat().st_uid == 0 and path.name.startswith("pytest"):
                path.chmod(path.stat().st_mode | 0o011)
        become = ["runuser", "-u", "postgres", "--"]
    quiet = {"check": True, "stdout": subprocess.DEVNULL}
    subprocess.run([*become, found[-1], "-D", data, "-A", "trust", "-U", "srcr"], **quiet)
    options = f"-k {folder} -h ''"
    subprocess.run([*become, control, "-D", data, "-o", options, "-w", "start"], **quiet)
    yield f"postgresql+psycopg://srcr@/postgres?host={folder}"
    subprocess.run([*become, control, "-D", data, "-m", "immediate", "stop"], **quiet)


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_what_was_measured_is_not_measured_again(database, request):
    storage = request.getfixturevalue(database)
    trials = Trials(storage, "one", "f", UNITS)
    found = trials.measure([CHOICES[0], CHOICES[4], CHOICES[0]], value, at_once=2)
    assert [m.kl for m in found] == [0, 4, 0]
    again = Trials(storage, "one", "f", UNITS)
    assert len(again) == 2
    assert again.measure([CHOICES[4], CHOICES[0]], never) == [Measured(4, whole=False), Measured(0)]
    assert [m.kl for m in again.measure(CHOICES, value)] == [0, 1, 2, 3, 4]
    assert again.results().keys() == set(CHOICES)


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_two_processes_share_a_study(database, request):
    storage = request.getfixturevalue(database)
    Trials(storage, "shared", "f", UNITS)
    workers = [start(storage, 0.5) for _ in range(2)]
    said = [worker.communicate(timeout=120)[0].splitlines() for worker in workers]
    assert all(lines[-1] == "[0.0, 1.0, 2.0, 3.0, 4.0]" for lines in said)
    measured = [line for lines in said for line in lines[:-1]]
    assert set(measured) == {f"measured {i}" for i in range(5)}
    assert len(measured) <= 6, (
        "both may begin with the same; what one has taken the other leaves alone"
    )


def test_what_a_killed_process_had_taken_is_measured_by_the_next(sqlite):
    worker = start(sqlite, 60)
    assert worker.stdout.readline() == "measured 0\n"
    worker.kill()
    worker.wait()
    began = time.monotonic()
    found = Trials(sqlite, "shared", "f", UNITS).measure(CHOICES, value)
    assert [m.kl for m in found] == [0, 1, 2, 3, 4]
    assert time.monotonic() - began < 30, "a dead process is not waited for"


def test_a_study_of_another_search_is_refused(sqlite):
    Trials(sqlite, "one", "f", UNITS)
    with pytest.raises(InputError, match="another search"):
        Trials(sqlite, "one", "g", UNITS)


@pytest.mark.parametrize("storage", ["nonsense", "sqlite:////no/such/folder/x.db", "what://x"])
def test_a_storage_that_cannot_be_used(storage):
    with pytest.raises(InputError, match="storage"):
        Trials(storage, "one", "f", UNITS)
