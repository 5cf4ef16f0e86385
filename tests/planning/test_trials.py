import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest

from srcr.errors import InputError
from srcr.models.topology import LinearGroup
from srcr.planning.space import measurement
from srcr.planning.specs import SearchSpec
from srcr.planning.trials import Trials, TrialsSpec
from srcr.plans.specs import CompressionLevel

pytestmark = pytest.mark.slow

GROUPS = (LinearGroup(("a.q", "a.k")), LinearGroup(("a.o",)))
ASSIGNMENTS = [
    (CompressionLevel(0.25, bits), CompressionLevel(1 / 3, 4)) for bits in (2, 3, 4, 5)
] + [(None, CompressionLevel(0, 8))]

WORKER = """
import sys, time
from srcr.planning.space import measurement
from srcr.planning.trials import Trials, TrialsSpec
sys.path.insert(0, sys.argv[2])
from test_trials import ASSIGNMENTS, GROUPS
trials = Trials(TrialsSpec(sys.argv[1], "shared", "f"), GROUPS)
def slow(assignments):
    for assignment in assignments:
        print("measured", ASSIGNMENTS.index(assignment), flush=True)
        time.sleep(float(sys.argv[3]))
        yield measurement(assignment, float(ASSIGNMENTS.index(assignment)))
print([m.kl for m in trials.measure(ASSIGNMENTS, slow)])
"""


def open_trials(storage, study="one", fingerprint="f"):
    return Trials(TrialsSpec(storage, study, fingerprint), GROUPS)


def value(assignments):
    return [
        measurement(each, float(ASSIGNMENTS.index(each)), complete=each[0] is not None)
        for each in assignments
    ]


def never(assignments):
    assert not assignments
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
    initdbs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not initdbs:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    pytest.importorskip("psycopg")
    folder = tmp_path_factory.mktemp("postgresql")
    control, data = initdbs[-1].with_name("pg_ctl"), folder / "data"
    become = []
    if os.getuid() == 0:  # it does not run as root
        shutil.chown(folder, "postgres")
        for path in (folder, *folder.parents):
            if path.stat().st_uid == 0 and path.name.startswith(("pytest", "popen")):
                path.chmod(path.stat().st_mode | 0o011)
        become = ["runuser", "-u", "postgres", "--"]
    quiet = {"check": True, "stdout": subprocess.DEVNULL}
    subprocess.run([*become, initdbs[-1], "-D", data, "-A", "trust", "-U", "srcr"], **quiet)
    options = f"-k {folder} -h ''"
    subprocess.run([*become, control, "-D", data, "-o", options, "-w", "start"], **quiet)
    yield f"postgresql+psycopg://srcr@/postgres?host={folder}"
    subprocess.run([*become, control, "-D", data, "-m", "immediate", "stop"], **quiet)


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_what_was_measured_is_not_measured_again(database, request):
    storage = request.getfixturevalue(database)
    trials = open_trials(storage)
    results = trials.measure([ASSIGNMENTS[0], ASSIGNMENTS[4], ASSIGNMENTS[0]], value, at_once=2)
    assert [m.kl for m in results] == [0, 4, 0]
    again = open_trials(storage)
    assert len(again) == 2
    assert again.measure([ASSIGNMENTS[4], ASSIGNMENTS[0]], never) == [
        measurement(ASSIGNMENTS[4], 4, complete=False), measurement(ASSIGNMENTS[0], 0),
    ]  # fmt: skip
    assert [m.kl for m in again.measure(ASSIGNMENTS, value)] == [0, 1, 2, 3, 4]
    assert again.results().keys() == set(ASSIGNMENTS)


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_two_processes_share_a_study(database, request):
    storage = request.getfixturevalue(database)
    open_trials(storage, "shared")
    workers = [start(storage, 0.5) for _ in range(2)]
    outputs = [worker.communicate(timeout=120)[0].splitlines() for worker in workers]
    assert all(lines[-1] == "[0.0, 1.0, 2.0, 3.0, 4.0]" for lines in outputs)
    measured = [line for lines in outputs for line in lines[:-1]]
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
    results = open_trials(sqlite, "shared").measure(ASSIGNMENTS, value)
    assert [m.kl for m in results] == [0, 1, 2, 3, 4]
    assert time.monotonic() - began < 30, "a dead process is not waited for"


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_the_tools_of_optuna_see_sparsity_and_bits_of_every_group(database, request):
    storage = request.getfixturevalue(database)
    open_trials(storage, "shown").measure([ASSIGNMENTS[1], ASSIGNMENTS[4]], value)
    study = optuna.load_study(study_name="shown", storage=storage)
    assert [trial.params for trial in study.trials] == [
        {"a.q/k sparsity": 0.25, "a.q/k bits": 3, "a.o sparsity": 1 / 3, "a.o bits": 4},
        {"a.q/k sparsity": 0.0, "a.q/k bits": 16, "a.o sparsity": 0.0, "a.o bits": 8},
    ]
    assert [trial.value for trial in study.trials] == [1, 4]
    assert "params_a.o bits" in study.trials_dataframe()
    assert open_trials(storage, "shown").measure([ASSIGNMENTS[1]], never)[0].kl == 1


def test_a_study_of_another_search_is_refused(sqlite):
    open_trials(sqlite)
    with pytest.raises(InputError, match="another search"):
        open_trials(sqlite, fingerprint="g")


@pytest.mark.parametrize("storage", ["nonsense", "sqlite:////no/such/folder/x.db", "what://x"])
def test_a_storage_that_cannot_be_used(storage):
    with pytest.raises(InputError, match="storage"):
        open_trials(storage)


@pytest.mark.parametrize("precision", [0, -0.1, 1e-5, 1])
def test_a_precision_that_no_search_reaches_is_refused(precision):
    with pytest.raises(InputError, match=r"tcr_precision .* must be from 0.0001 to 1"):
        SearchSpec(tcr_precision=precision)
