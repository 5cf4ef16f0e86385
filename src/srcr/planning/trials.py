"""Candidates that were measured, in an Optuna study: what is there is not measured again.

A search proposes candidates in a fixed order that depends on results alone, so it can be killed at any moment
and started again, and several processes can work through one study: each takes what nobody has taken, and all
come to the same end.
"""

import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import FloatDistribution, IntDistribution, distribution_to_json
from optuna.storages._rdb.models import TrialParamModel
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event, insert

from srcr.errors import InputError, first_line
from srcr.models.topology import LinearGroup
from srcr.planning.space import Assignment, measurement
from srcr.plans.specs import CompressionLevel
from srcr.records.search import Measurement

#: Measures assignments, in their order.
Measure = Callable[[Sequence[Assignment]], Iterable[Measurement]]

#: How Optuna's tools are told of a group's level, and how much of its label: their column has 512 places.
SPARSITY = distribution_to_json(FloatDistribution(0, 1))
BITS = distribution_to_json(IntDistribution(2, 16))
LABEL = 480


@dataclass(frozen=True)
class TrialsSpec:
    """Where and how trials are shared: ``storage``, a database URL; the ``study`` in it; a ``fingerprint`` of
    what decides a trial's result. ``lost_after`` seconds a trial that another machine has taken counts as
    lost, but not before ``lost_factor`` times what the longest has taken: a process cannot tell whether one
    on another machine is still at work. ``lock_seconds``: so long it waits for others to be done with an
    SQLite file."""

    storage: str
    study: str
    fingerprint: str
    lost_after: float = 30.0
    lost_factor: float = 10.0
    lock_seconds: float = 60.0


class Trials:
    """The study of a spec, whose trials name the levels of the ``groups``: as one text, and as parameters.

    Raises:
        InputError: the database cannot be opened, or the study was made with other settings.
    """

    def __init__(self, spec: TrialsSpec, groups: Sequence[LinearGroup]) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._spec = spec
        self._size = len(groups)
        self._labels = [group.label[:LABEL] for group in groups]
        try:
            self._database = _open(spec.storage, spec.lock_seconds)
            self._study = optuna.create_study(
                storage=self._database,
                study_name=spec.study,
                load_if_exists=True,
            )
            known = self._study.user_attrs.get("fingerprint")
            if known is None:
                self._study.set_user_attr("fingerprint", spec.fingerprint)
        except Exception as error:  # SQLAlchemy's drivers raise many kinds
            raise InputError(f"storage {spec.storage}: {first_line(error)}") from None
        if known not in (None, spec.fingerprint):
            raise InputError(
                f"storage {spec.storage} holds a study {spec.study!r} of another search (model, data, "
                "target, levels or seed differ): give the same options, or another --storage"
            )
        self._known: dict[Assignment, Measurement] = {}
        self._read: set[int] = set()

    def __len__(self) -> int:
        self._refresh()
        return len(self._known)

    def results(self) -> dict[Assignment, Measurement]:
        """Everything measured so far."""
        self._refresh()
        return dict(self._known)

    def measure(
        self, assignments: Sequence[Assignment], measure: Measure, at_once: int = 1
    ) -> list[Measurement]:
        """Each assignment's result: from the study where it is there, else by ``measure``, ``at_once`` of
        them at a time. What another process has taken is waited for, and measured here if that does not
        end."""
        self._refresh()
        taken = {
            self._assignment(t) for t in self._trials((TrialState.WAITING, TrialState.RUNNING))
        }
        for assignment in dict.fromkeys(assignments):
            if assignment not in self._known and assignment not in taken:
                self._enqueue(assignment)
        wanted = set(assignments)
        while self._take(wanted, measure, at_once):
            pass
        self._wait(wanted)
        rest = [each for each in dict.fromkeys(assignments) if each not in self._known]
        for assignment in rest:  # a process died with them
            self._enqueue(assignment)
        while rest and self._take(set(rest), measure, at_once, leave_taken=False):
            pass
        return [self._known[assignment] for assignment in assignments]

    def _take(
        self, wanted: set[Assignment], measure: Measure, at_once: int, leave_taken: bool = True
    ) -> bool:
        """Take waiting trials and measure them, but with ``leave_taken`` not those that others are at work
        on; whether any waited."""
        asked = self._ask(wanted, at_once)
        self._refresh()
        theirs = self._first_takers() if leave_taken else {}
        fresh = []
        for trial, assignment in asked:
            if assignment in self._known or theirs.get(assignment, trial.number) < trial.number:
                self._study.tell(trial, state=TrialState.FAIL)
            else:
                fresh.append((trial, assignment))
        results = measure([assignment for _, assignment in fresh])
        for (trial, assignment), result in zip(fresh, results, strict=True):
            if not result.complete:
                trial.set_user_attr("whole", False)
            self._show(trial, assignment)
            self._study.tell(trial, result.kl)
            self._known[assignment] = result
        return bool(asked)

    def _ask(self, wanted: set[Assignment], at_once: int) -> list[tuple[optuna.Trial, Assignment]]:
        """Waiting trials, now taken by this process: as long as any of the wanted ones waits."""
        asked: list[tuple[optuna.Trial, Assignment]] = []
        for _ in range(at_once):
            if not any(self._assignment(t) in wanted for t in self._trials((TrialState.WAITING,))):
                break
            trial = self._study.ask()
            assignment = self._assignment(trial)
            if assignment is None:  # another process was faster, and this one is of no use
                self._study.tell(trial, state=TrialState.FAIL)
                continue
            trial.set_user_attr("worker", _worker())
            asked.append((trial, assignment))
        return asked

    def _wait(self, wanted: set[Assignment]) -> None:
        """Until nobody is at work on what is wanted, or it takes too long."""
        spec, began = self._spec, time.monotonic()
        while True:
            self._refresh()
            missing = wanted - self._known.keys()
            running = [
                trial
                for trial in self._trials((TrialState.RUNNING,))
                if self._assignment(trial) in missing and _alive(trial.user_attrs.get("worker"))
            ]
            limit = max(spec.lost_after, spec.lost_factor * self._longest())
            if not running or time.monotonic() - began > limit:
                return
            time.sleep(0.2)

    def _first_takers(self) -> dict[Assignment | None, int]:
        """The first of the trials of each assignment that a process is at work on."""
        first: dict[Assignment | None, int] = {}
        for trial in self._trials((TrialState.RUNNING,)):
            if _alive(trial.user_attrs.get("worker")):
                assignment = self._assignment(trial)
                first[assignment] = min(trial.number, first.get(assignment, trial.number))
        return first

    def _longest(self) -> float:
        trials = self._trials((TrialState.COMPLETE,))
        return max((t.duration.total_seconds() for t in trials if t.duration), default=0.0)

    def _refresh(self) -> None:
        for trial in self._trials((TrialState.COMPLETE,)):
            if trial.number not in self._read:
                self._read.add(trial.number)
                assignment = self._assignment(trial)
                if assignment is not None and trial.value is not None:
                    complete = bool(trial.user_attrs.get("whole", True))
                    result = measurement(assignment, trial.value, complete)
                    self._known.setdefault(assignment, result)

    def _trials(self, states: tuple[TrialState, ...]) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=states)

    def _enqueue(self, assignment: Assignment) -> None:
        # As one text, which is what is read back; :meth:`_show` is for people.
        text = ";".join(_text(level) for level in assignment)
        self._study.enqueue_trial({}, user_attrs={"levels": text})

    def _show(self, trial: optuna.Trial, assignment: Assignment) -> None:
        """Store the levels as parameters too, sparsity and bits of each group, for optuna-dashboard and
        ``optuna.visualization``. In one statement: Optuna's own way asks the database twice about each, which
        takes longer than measuring a small model."""
        rows = []
        for label, level in zip(self._labels, assignment, strict=True):
            sparsity, bits = (level.sparsity, level.num_bits) if level else (0.0, 16)
            parameters = ((f"{label} sparsity", sparsity, SPARSITY), (f"{label} bits", bits, BITS))
            rows += [
                {
                    "trial_id": trial._trial_id,
                    "param_name": name,
                    "param_value": value,
                    "distribution_json": distribution,
                }
                for name, value, distribution in parameters
            ]
        with self._database.engine.begin() as connection:
            connection.execute(insert(TrialParamModel), rows)

    def _assignment(self, trial: FrozenTrial | optuna.Trial) -> Assignment | None:
        text = trial.user_attrs.get("levels", "")
        assignment = tuple(_level(part) for part in text.split(";")) if text else ()
        return assignment if len(assignment) == self._size else None


def _open(url: str, lock_seconds: float) -> optuna.storages.RDBStorage:
    """A database. In SQLite a transaction takes the write lock at once: it has no lock on a row, and Python's
    driver begins none before the first write, so that two processes would be given the same trial."""
    sqlite = url.startswith("sqlite")
    opened = optuna.storages.RDBStorage(
        url, engine_kwargs={"connect_args": {"timeout": lock_seconds}} if sqlite else None
    )
    if sqlite:

        @event.listens_for(opened.engine, "connect")
        def connected(connection: Any, _: Any) -> None:
            connection.isolation_level = None  # the driver begins nothing itself

        @event.listens_for(opened.engine, "begin")
        def begun(connection: Any) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE")

        opened.engine.dispose()  # what was opened before
    return opened


def _text(level: CompressionLevel | None) -> str:
    return "none" if level is None else f"{level.sparsity!r},{level.num_bits}"


def _level(text: str) -> CompressionLevel | None:
    if text == "none":
        return None
    sparsity, bits = text.split(",")
    return CompressionLevel(float(sparsity), int(bits))


def _worker() -> str:
    return f"{platform.node()}:{os.getpid()}"


def _alive(worker: str | None) -> bool:
    """Whether the process that took a trial still runs, as far as can be told from here."""
    host, _, number = (worker or ":").rpartition(":")
    if host != platform.node() or not number.isdigit():
        return True
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
