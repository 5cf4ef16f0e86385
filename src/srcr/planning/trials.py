"""Candidates that were measured, in an Optuna study: what is there is not measured again.

A search proposes candidates in a fixed order that depends on results alone, so it can be killed at any moment
and started again, and several processes can work through one study: each takes what nobody has taken, and all
come to the same end.
"""

import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event

from srcr.errors import InputError, first_line
from srcr.planning.candidates import Choice, Measured
from srcr.planning.levels import Decision, Level

#: Measures some choices, in their order.
Measure = Callable[[Sequence[Choice]], Iterable[Measured]]
#: Seconds after which a trial that another machine has taken counts as lost, at least.
PATIENCE = 30.0
#: Or so many times what the longest has taken.
LONGEST = 10
#: Seconds that a process waits for others to be done with an SQLite file.
LOCKED = 60


class Trials:
    """The study ``name`` in ``storage`` (a database URL), whose trials name the units' levels.

    Raises:
        InputError: the database cannot be opened, or the study was made with other settings.
    """

    def __init__(
        self, storage: str, name: str, fingerprint: str, units: Sequence[Decision]
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.units = tuple(units)
        try:
            self.study = optuna.create_study(
                storage=_open(storage), study_name=name, load_if_exists=True
            )
            known = self.study.user_attrs.get("fingerprint")
            if known is None:
                self.study.set_user_attr("fingerprint", fingerprint)
        except Exception as error:  # SQLAlchemy's drivers raise many kinds
            raise InputError(f"storage {storage}: {first_line(error)}") from None
        if known not in (None, fingerprint):
            raise InputError(
                f"storage {storage} holds a study {name!r} of another search (model, data, target, levels or "
                "seed differ): give the same options, or another --storage"
            )
        self._known: dict[Choice, Measured] = {}
        self._read: set[int] = set()

    def __len__(self) -> int:
        self._refresh()
        return len(self._known)

    def results(self) -> dict[Choice, Measured]:
        """Everything measured so far."""
        self._refresh()
        return dict(self._known)

    def measure(
        self, choices: Sequence[Choice], measure: Measure, at_once: int = 1
    ) -> list[Measured]:
        """Each choice's result: from the study where it is there, else by ``measure``, ``at_once`` of them
        at a time. What another process has taken is waited for, and measured here if that does not end."""
        self._refresh()
        taken = {self._choice(t) for t in self._trials((TrialState.WAITING, TrialState.RUNNING))}
        for choice in dict.fromkeys(choices):
            if choice not in self._known and choice not in taken:
                self._enqueue(choice)
        wanted = set(choices)
        while self._take(wanted, measure, at_once):
            pass
        self._wait(wanted)
        rest = [choice for choice in dict.fromkeys(choices) if choice not in self._known]
        for choice in rest:  # a process died with them
            self._enqueue(choice)
        while rest and self._take(set(rest), measure, at_once, others=False):
            pass
        return [self._known[choice] for choice in choices]

    def _take(
        self, wanted: set[Choice], measure: Measure, at_once: int, others: bool = True
    ) -> bool:
        """Take some waiting trials and measure them, but for those that ``others`` are at already; False
        where none waits."""
        mine: list[tuple[optuna.Trial, Choice]] = []
        for _ in range(at_once):
            if not any(self._choice(t) in wanted for t in self._trials((TrialState.WAITING,))):
                break
            trial = self.study.ask()
            found = self._choice(trial)
            if found is None:  # another process was faster, and this one is of no use
                self.study.tell(trial, state=TrialState.FAIL)
                continue
            trial.set_user_attr("worker", _worker())
            mine.append((trial, found))
        self._refresh()
        theirs = self._first_takers() if others else {}
        fresh = []
        for trial, choice in mine:
            if choice in self._known or theirs.get(choice, trial.number) < trial.number:
                self.study.tell(trial, state=TrialState.FAIL)
            else:
                fresh.append((trial, choice))
        for (trial, choice), result in zip(
            fresh, measure([choice for _, choice in fresh]), strict=True
        ):
            if not result.whole:
                trial.set_user_attr("whole", False)
            self.study.tell(trial, result.kl)
            self._known[choice] = result
        return bool(mine)

    def _wait(self, wanted: set[Choice]) -> None:
        """Until nobody is at work on what is wanted, or it takes too long."""
        began = time.monotonic()
        while True:
            self._refresh()
            running = [
                t for t in self._trials((TrialState.RUNNING,))
                if self._choice(t) in wanted - self._known.keys() and _alive(t.user_attrs.get("worker"))
            ]  # fmt: skip
            if not running or time.monotonic() - began > max(PATIENCE, LONGEST * self._longest()):
                return
            time.sleep(0.2)

    def _first_takers(self) -> dict[Choice | None, int]:
        """The first of the trials of each choice that somebody is at work on."""
        found: dict[Choice | None, int] = {}
        for trial in self._trials((TrialState.RUNNING,)):
            if _alive(trial.user_attrs.get("worker")):
                choice = self._choice(trial)
                found[choice] = min(trial.number, found.get(choice, trial.number))
        return found

    def _longest(self) -> float:
        trials = self._trials((TrialState.COMPLETE,))
        return max((t.duration.total_seconds() for t in trials if t.duration), default=0.0)

    def _refresh(self) -> None:
        for trial in self._trials((TrialState.COMPLETE,)):
            if trial.number not in self._read:
                self._read.add(trial.number)
                choice = self._choice(trial)
                if choice is not None and trial.value is not None:
                    whole = bool(trial.user_attrs.get("whole", True))
                    self._known.setdefault(choice, Measured(trial.value, whole))

    def _trials(self, states: tuple[TrialState, ...]) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states)

    def _enqueue(self, choice: Choice) -> None:
        # As one text: a study with two parameters a unit takes many times longer to write.
        text = ";".join(_text(level) for level in choice)
        self.study.enqueue_trial({}, user_attrs={"levels": text})

    def _choice(self, trial: FrozenTrial | optuna.Trial) -> Choice | None:
        text = trial.user_attrs.get("levels", "")
        choice = tuple(_level(part) for part in text.split(";")) if text else ()
        return choice if len(choice) == len(self.units) else None


def _open(url: str) -> optuna.storages.RDBStorage:
    """A database. In SQLite a transaction takes the write lock at once: it has no lock on a row, and Python's
    driver begins none before the first write, so that two processes would be given the same trial."""
    sqlite = url.startswith("sqlite")
    opened = optuna.storages.RDBStorage(
        url, engine_kwargs={"connect_args": {"timeout": LOCKED}} if sqlite else None
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


def _text(level: Level | None) -> str:
    return "none" if level is None else f"{level.sparsity!r},{level.num_bits}"


def _level(text: str) -> Level | None:
    if text == "none":
        return None
    sparsity, bits = text.split(",")
    return Level(float(sparsity), int(bits))


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
