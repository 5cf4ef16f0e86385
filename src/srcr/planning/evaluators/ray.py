"""Candidates measured by the workers of a Ray cluster, and levels made there."""

import logging
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from srcr.errors import InputError, SrcrError, first_line
from srcr.models.checkpoint import OpenModel, open_model
from srcr.models.transformed import TransformedSource
from srcr.numerics.compressed import CompressedWeight
from srcr.planning.database.build import LevelProblem, SolveLevels, solve_level
from srcr.planning.evaluators.local import EvaluatorInputs, LocalEvaluator
from srcr.planning.space import Assignment
from srcr.plans.plan import LayerPlan
from srcr.records.search import Measurement

#: How often what a worker lost is tried again on another: enough for machines that come and go, not for a
#: task that kills every worker.
RETRIES = 5
#: Seconds in which a cluster's host answers; Ray itself would try for minutes.
CONNECT_SECONDS = 10


class Worker:
    """What runs in a Ray actor; it centers on the incumbent that it is given with each assignment."""

    def __init__(self, folder: Path, inputs: EvaluatorInputs) -> None:
        opened = open_model(folder)
        self._local = LocalEvaluator(inputs.candidates(opened))
        self._incumbent: Assignment | None = None

    def measure(self, assignment: Assignment, incumbent: Assignment | None) -> Measurement:
        """The measurement of one assignment."""
        if incumbent is not None and incumbent != self._incumbent:
            self._local.center_on(incumbent)
            self._incumbent = incumbent
        return next(self._local.measure([assignment]))


class RayEvaluator:
    """An :class:`~srcr.planning.evaluators.Evaluator` of so many ``workers`` on a cluster (None: one a CPU).
    One that dies is started again, and what it was at is given to it anew. They open the model's folder
    themselves."""

    def __init__(
        self, ray: Any, folder: Path, inputs: EvaluatorInputs, workers: int | None = None
    ) -> None:
        self.parallel = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._ray = ray
        self._incumbent: Assignment | None = None
        actor = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=RETRIES)(Worker)
        self._inputs = ray.put(inputs)  # for as long as a worker may be started again
        self.actors = [actor.remote(folder.resolve(), self._inputs) for _ in range(self.parallel)]

    def center_on(self, assignment: Assignment) -> None:
        """Take the incumbent."""
        self._incumbent = assignment

    def measure(self, assignments: Sequence[Assignment]) -> Iterator[Measurement]:
        """Spread over the workers, each taking the next when it is free; in the order asked for.

        Raises:
            SrcrError: a worker fails.
        """
        pool = self._ray.util.ActorPool(self.actors)
        try:
            yield from pool.map(
                lambda actor, assignment: actor.measure.remote(assignment, self._incumbent),
                list(assignments),
            )
        except self._ray.exceptions.RayError as error:
            raise SrcrError(f"a Ray worker failed: {first_line(error)}") from error


def check_ray(address: str | None, opened: OpenModel) -> None:
    """Refuse a cluster for a model that its workers cannot open by name.

    Raises:
        InputError: it is in memory, or its weights are not those of its files.
    """
    in_folder = opened.folder is not None and not isinstance(opened.source, TransformedSource)
    if address is not None and not in_folder:
        raise InputError(
            f"--ray {address}: the workers open the model by its folder, and this one is in memory: save it "
            "and give the folder, or leave Ray out"
        )


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


def _check_address(address: str) -> None:
    """Refuse a host that does not answer.

    Raises:
        InputError: names it.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise InputError(
            f"--ray {address}: {first_line(error)}; give the address of a running cluster, or 'local'"
        ) from None


def solve_on(ray: Any) -> SolveLevels:
    """Levels made on a cluster, each a task."""
    task = ray.remote(num_cpus=1, max_retries=RETRIES)(solve_level)

    def solve(
        problem: LevelProblem, plans: Sequence[Mapping[str, LayerPlan]]
    ) -> Iterable[dict[str, CompressedWeight]]:
        shared = ray.put(problem)
        levels: list[dict[str, CompressedWeight]] = ray.get(
            [task.remote(shared, each) for each in plans]
        )
        return levels

    return solve
