"""What sensitivity, plan and search work on: a model, its texts, its units, and their level database."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from srcr import progress
from srcr.budget import choose_room, needs
from srcr.compression import BATCH_TOKENS, Calibration, pick_device
from srcr.memory import parse_size
from srcr.models.load import load_model, resolve, sha256, weight_files
from srcr.models.weights import ModelWeights, open_weights
from srcr.planning.building import Space, build, check_room, context, database_bytes
from srcr.planning.database import LevelDatabase
from srcr.planning.levels import Decision, Level, decisions
from srcr.planning.texts import Texts, load_texts
from srcr.planning.workers import Bench, spread_over


@dataclass(frozen=True)
class Resources:
    """What the work may use: the folder of the level ``database`` (None: beside the work) and how many bytes
    it may take, the address of a ``ray`` cluster (None: this process), a ``memory`` budget for compression as
    :func:`srcr.compress` takes it."""

    database: Path | None = None
    database_limit: int | None = None
    ray: str | None = None
    memory: str | None = None


#: Nothing in particular.
NONE = Resources()


@dataclass(frozen=True, eq=False)
class Field:
    """An open model, its ``units``, and four ``texts``."""

    name: str
    folder: Path
    sha256: str
    source: ModelWeights
    units: tuple[Decision, ...]
    texts: Texts
    seed: int
    device: str

    def error(self, database: LevelDatabase, unit: Decision, level: Level) -> float:
        """The mean relative output error of a unit's linears, by their weights; 0 where nothing is done."""
        entry = database.find(unit.names, level)
        if entry is None:
            return 0.0
        shapes = self.source.topology.shapes
        sizes = {name: shapes[name][0] * shapes[name][1] for name in unit.names}
        return sum(sizes[n] * entry.errors[n] for n in unit.names) / sum(sizes.values())

    def bench(self, database: LevelDatabase) -> Bench:
        """What a worker needs to measure candidates."""
        return Bench(
            self.folder, database.folder, database.context, self.units, self.texts.search.input_ids,
            self.source.dtype, self.device,
        )  # fmt: skip


def open_field(
    model: str | Path, calibration: Calibration, seed: int, device: str, quiet: bool
) -> Field:
    """Load a model and its texts.

    Raises:
        InputError: as :func:`srcr.compress`.
    """
    folder, where = resolve(model), pick_device(device)
    with progress.stage("load", 1, quiet) as bar:
        source = open_weights(folder, where)
        bar.note(str(model), advance=1)
    with progress.stage("texts", 1, quiet) as bar:
        texts = load_texts(
            calibration, load_model(folder).to(where), folder, seed,
            lambda done, total: bar.reach(done / total, f"{calibration.source}: {done} tokens"),
        )  # fmt: skip
        bar.reach(1, f"{calibration.source}: {len(texts.calibration.input_ids)} sequences to calibrate, "
                  f"{len(texts.search.input_ids)} to search, to choose and to measure")  # fmt: skip
    return Field(
        str(model), folder, sha256(weight_files(folder)), source, decisions(source.topology), texts,
        seed, where.type,
    )  # fmt: skip


class _Steps:
    """Moves the bar: one step a unit."""

    def __init__(self, bar: progress.Bar, blocks: int) -> None:
        self._bar, self._blocks = bar, blocks

    def step(self, block: int, what: str) -> None:
        self._bar.note(f"block {block + 1}/{self._blocks} {what}", advance=1)


def fill_database(
    field: Field, space: Space, resources: Resources, default: Path, ray: Any, quiet: bool
) -> LevelDatabase:
    """The level database of a field, with every unit at every level; what is there is not made again. Its
    size is said before it is built.

    Raises:
        InputError: it would be larger than allowed, or than the disk.
    """
    topology = field.source.topology
    folder = resources.database or default
    needed = database_bytes(field.units, space.levels, topology)
    folder.mkdir(parents=True, exist_ok=True)
    check_room(needed, resources.database_limit, shutil.disk_usage(folder).free)
    if not quiet:
        progress.console().print(
            f"level database: {len(field.units)} units at {len(space.levels)} levels, about "
            f"{needed / 1e6:.1f} MB in {folder}"
        )
    ids = field.texts.calibration
    running = field.source.running
    database = LevelDatabase(
        folder, context(space, field.sha256, ids.sha256, field.device, running)
    )
    budget = None if resources.memory is None else parse_size(resources.memory)
    batches = torch.split(ids.input_ids, max(1, BATCH_TOKENS // ids.input_ids.shape[1]))
    room, said = choose_room(
        needs(topology, batches, 0, running), budget, torch.device(field.device), folder
    )
    if said and not quiet:
        progress.console().print(f"note: {said}")
    steps = sum(len(block.units) + 1 for block in topology.blocks) - 1
    with progress.stage("levels", steps, quiet) as bar:
        watcher = _Steps(bar, len(topology.blocks))
        build(field.source, batches, space, database, field.units, watcher, room, spread_over(ray))
        bar.reach(steps, f"{len(field.units)} units at {len(space.levels)} levels")
    return database
