import multiprocessing
import os
import shutil
import subprocess
import tempfile
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


def work(storage, seconds, sender):
    """Measure everything, ``seconds`` each, and send what is begun, in the end all results."""

    def slow(assignments):
        for assignment in assignments:
            sender.send(ASSIGNMENTS.index(assignment))
            time.sleep(seconds)
            yield measurement(assignment, float(ASSIGNMENTS.index(assignment)))

    trials = open_trials(storage, "shared")
    sender.send([m.kl for m in trials.measure(ASSIGNMENTS, slow)])


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
    """A process of its own that works, and what it sends. (Forked: a new one would import for seconds.)"""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(storage, seconds, sender), daemon=True)
    process.start()
    sender.close()  # this end of it, so that a process that dies is noticed
    return process, receiver


def received(receiver):
    """All that a process sends until it ends."""
    messages = []
    while receiver.poll(120):
        try:
            messages.append(receiver.recv())
        except EOFError:
            return messages
    raise TimeoutError("the process sends nothing and does not end")


@pytest.fixture
def sqlite(tmp_path):
    return f"sqlite:///{tmp_path}/study.db"


@pytest.fixture(scope="module")
def postgresql():
    """A server of its own, on a socket in a folder: not in pytest's, which other users may not enter."""
    initdbs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not initdbs:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    pytest.importorskip("psycopg")
    folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
    control, data = initdbs[-1].with_name("pg_ctl"), folder / "data"
    become = []
    if os.getuid() == 0:  # it does not run as root
        shutil.chown(folder, "postgres")
        become = ["runuser", "-u", "postgres", "--"]
    quiet = {"check": True, "stdout": subprocess.DEVNULL}
    subprocess.run([*become, initdbs[-1], "-D", data, "-A", "trust", "-U", "srcr"], **quiet)
    options = f"-k {folder} -h ''"
    subprocess.run([*become, control, "-D", data, "-o", options, "-w", "start"], **quiet)
    yield f"postgresql+psycopg://srcr@/postgres?host={folder}"
    subprocess.run([*become, control, "-D", data, "-m", "immediate", "stop"], **quiet)
    shutil.rmtree(folder)


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
    outputs = [received(receiver) for _, receiver in workers]
    for process, _ in workers:
        process.join()
    assert all(messages[-1] == [0.0, 1.0, 2.0, 3.0, 4.0] for messages in outputs)
    measured = [number for messages in outputs for number in messages[:-1]]
    assert set(measured) == set(range(5))
    assert len(measured) <= 6, (
        "both may begin with the same; what one has taken the other leaves alone"
    )


def test_what_a_killed_process_had_taken_is_measured_by_the_next(sqlite):
    process, receiver = start(sqlite, 60)
    assert receiver.recv() == 0
    process.kill()
    process.join()
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
