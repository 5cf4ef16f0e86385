"""Who measures candidates: this process, or the workers of a Ray cluster."""

import logging
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from srcr.errors import InputError, SrcrError, first_line
from srcr.models.load import load_model
from srcr.models.topology import observe
from srcr.planning.building import LevelInputs, Spread, compress_level, one_by_one
from srcr.planning.candidates import KEPT, Candidates, Choice, Measured
from srcr.planning.database import LevelDatabase
from srcr.planning.levels import Decision, Level
from srcr.types import CompressedWeight, LayerPlan

#: Batches that a text is cut into: after each, a hopeless candidate is given up.
BATCHES = 4
#: How often a lost trial is tried again on another worker.
RETRIES = 5


@dataclass(frozen=True, eq=False)
class Bench:
    """All that a worker needs to measure candidates: the base's folder, the level database, the units, and
    the text as token ids [n, len]."""

    folder: Path
    database: Path
    context: str
    units: tuple[Decision, ...]
    input_ids: Tensor
    dtype: torch.dtype
    device: str

    def open(self) -> Candidates:
        """Load the base."""
        model = load_model(self.folder, torch.float32).to(self.device)
        database = LevelDatabase(self.database, self.context)
        kept: dict[tuple[Decision, Level], dict[str, Tensor]] = {}
        room = KEPT

        def weights(unit: Decision, level: Level) -> dict[str, Tensor]:
            nonlocal room
            if (unit, level) in kept:
                return kept[unit, level]
            entry = database.find(unit.names, level)
            if entry is None:
                database.refresh()
                entry = database.find(unit.names, level)
            if entry is None:
                raise SrcrError(
                    f"the level database {self.database} has lost {unit.label} at {level}: run again with "
                    "--resume to build it anew"
                )
            found = database.weights(entry, self.dtype)
            room -= sum(weight.nbytes for weight in found.values())
            if room > 0:
                kept[unit, level] = found
            return found

        size = -(-len(self.input_ids) // BATCHES)
        batches = torch.split(self.input_ids, size)
        return Candidates(model, observe(model), self.units, weights, batches)


class Crew(Protocol):
    """Measures candidates, several at once."""

    at_once: int

    def stand_at(self, choice: Choice) -> None:
        """The incumbent, around which the next will be."""
        ...

    def measure(self, choices: Sequence[Choice]) -> Iterator[Measured]:
        """The choices in their order."""
        ...


class Alone:
    """This process measures."""

    at_once = 1

    def __init__(self, bench: Bench) -> None:
        self._candidates = bench.open()
        self._pace: list[float] = []

    def stand_at(self, choice: Choice) -> None:
        """The incumbent."""
        self._candidates.stand_at(choice)
        # One unit alone has nothing to keep pace with.
        self._pace = [] if None in choice else self._candidates.pace(choice)

    def measure(self, choices: Sequence[Choice]) -> Iterator[Measured]:
        """One after the other."""
        for choice in choices:
            yield self._candidates.measure(choice, self._pace)


class Worker:
    """What runs in a Ray actor; it stands at the incumbent it is given with each choice."""

    def __init__(self, bench: Bench) -> None:
        self._alone = Alone(bench)
        self._at: Choice | None = None

    def measure(self, choice: Choice, incumbent: Choice | None) -> Measured:
        """One choice."""
        if incumbent is not None and incumbent != self._at:
            self._alone.stand_at(incumbent)
            self._at = incumbent
        return next(self._alone.measure([choice]))


class Cluster:
    """Ray workers measure; one that dies is started again, and what it was at is given to it anew."""

    def __init__(self, bench: Bench, ray: Any, workers: int) -> None:
        self.at_once = workers
        self._ray = ray
        self._incumbent: Choice | None = None
        actor = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=RETRIES)(Worker)
        self._bench = ray.put(bench)  # for as long as a worker may be started again
        self.actors = [actor.remote(self._bench) for _ in range(workers)]

    def stand_at(self, choice: Choice) -> None:
        """The incumbent."""
        self._incumbent = choice

    def measure(self, choices: Sequence[Choice]) -> Iterator[Measured]:
        """Spread over the workers, each taking the next when it is free; in the order asked for."""
        pool = self._ray.util.ActorPool(self.actors)
        try:
            yield from pool.map(
                lambda actor, choice: actor.measure.remote(choice, self._incumbent), list(choices)
            )
        except self._ray.exceptions.RayError as error:
            raise SrcrError(f"a Ray worker failed: {first_line(error)}") from error


def _check_address(address: str) -> None:
    """Ray would try for minutes to reach a host that does not answer.

    Raises:
        InputError: it does not.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise InputError(
            f"--ray {address}: {first_line(error)}; give the address of a running cluster, or 'local'"
        ) from None


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Ray, connected to the cluster at ``address`` ("local" starts one on this machine); None without one.

    Raises:
        InputError: Ray is not installed, or there is no cluster at the address.
    """
    if address is None:
        yield None
        return
    try:
        import ray
        import ray.util
    except ImportError:
        raise InputError(f"--ray {address} needs Ray: pip install 'srcr[ray]'") from None
    _check_address(address)
    try:
        where = None if address == "local" else address
        ray.init(address=where, log_to_driver=False, logging_level=logging.ERROR,
                 include_dashboard=False)  # fmt: skip
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"--ray {address}: {first_line(error)}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def spread_over(ray: Any) -> Spread:
    """Levels made on a cluster, each a task; in this process without one."""
    if ray is None:
        return one_by_one
    task = ray.remote(num_cpus=1, max_retries=RETRIES)(compress_level)

    def spread(
        inputs: LevelInputs, plans: Sequence[dict[str, LayerPlan]]
    ) -> Iterable[dict[str, CompressedWeight]]:
        shared = ray.put(inputs)
        found: list[dict[str, CompressedWeight]] = ray.get(
            [task.remote(shared, one) for one in plans]
        )
        return found

    return spread


def crew(bench: Bench, ray: Any, workers: int | None = None) -> Crew:
    """Who measures: this process, or on a cluster as many workers as it has CPUs unless a number is given."""
    if ray is None:
        return Alone(bench)
    return Cluster(bench, ray, workers or max(1, int(ray.cluster_resources().get("CPU", 1))))
