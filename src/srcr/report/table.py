"""The table of runs: its columns, what each means, and a cell for each run."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from srcr.environment import format_bytes
from srcr.models.topology import LinearGroup
from srcr.records.estimate import Interval
from srcr.records.run import Rates
from srcr.records.sensitivity import SensitivityTable
from srcr.report.plots import method, mode
from srcr.report.runs import Run


@dataclass(frozen=True)
class Cell:
    """What a cell shows, a second line, and what it sorts by (None: last)."""

    text: str
    below: str = ""
    sort: float | str | None = None


@dataclass(frozen=True)
class RateMap:
    """SrCr over sparsity (columns) and bits (rows): (SrCr, run's number) of each cell, best first."""

    sparsities: tuple[int, ...]
    rows: tuple[tuple[float, tuple[tuple[tuple[float, int], ...], ...]], ...]
    lowest: float
    highest: float

    def heat(self, value: float) -> float:
        """Where a value lies between the lowest and the highest, from 0 to 1."""
        return (value - self.lowest) / (self.highest - self.lowest or 1)


@dataclass(frozen=True)
class LossMap:
    """What groups (rows) lose at levels (columns): (KL or None, output error, heat) of each cell. Heat is the
    loss's logarithm between the table's lowest and highest, from 0 to 1."""

    base: str
    levels: tuple[str, ...]
    rows: tuple[tuple[str, tuple[tuple[float | None, float, float], ...]], ...]
    measured: bool


@dataclass(frozen=True)
class Column:
    """A heading, its meaning in one line, and how a run's cell is made."""

    title: str
    meaning: str
    cell: Callable[[Run], Cell]
    numeric: bool = True


NBSP = "\N{NO-BREAK SPACE}"
NOTHING = Cell("–")


def percent(value: float | None, digits: int = 1) -> str:
    """A share in percent."""
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f}{NBSP}%"


def number(value: float | None) -> str:
    """Three significant digits; of thousands, all."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.3g}"


def percents(ci95: Interval | None) -> str:
    """A 95 % interval of shares."""
    return f"[{100 * ci95[0]:.1f}, {100 * ci95[1]:.1f}]" if ci95 else ""


def numbers(ci95: Interval | None) -> str:
    """A 95 % interval."""
    return f"[{ci95[0]:.3g}, {ci95[1]:.3g}]" if ci95 else ""


def smaller(base: float, now: float) -> str:
    """How many times smaller, as "3.2 × smaller"; honest where it is not."""
    if not base or not now:
        return "unknown"
    ratio = base / now
    if 0.95 < ratio < 1.05:
        return "the same size"
    return f"{ratio:.1f}{NBSP}× smaller" if ratio > 1 else f"{1 / ratio:.1f}{NBSP}× larger"


def structure(run: Run) -> str:
    """The pattern of the zeros."""
    if run.plan is None:
        return "unknown"
    pruned = {
        layer.prune.mask_structure for layer in run.plan.layers if layer.prune and layer.sparsity
    }
    return " + ".join(sorted(pruned)) or "none"


def group(run: Run) -> str:
    """How many weights share a scale."""
    if run.plan is None:
        return "–"
    sizes = {layer.quant.group_size for layer in run.plan.layers if layer.quant}
    names = sorted("channel" if size == -1 else str(size) for size in sizes)
    return ", ".join(names) or "–"


def loss_map(table: SensitivityTable) -> LossMap:
    """The heat map of a table of losses: where KL was measured, only the levels at which it was."""
    losses = [{loss.level: loss for loss in group.losses} for group in table.groups]
    measured = {level for row in losses for level, loss in row.items() if loss.kl is not None}
    levels = [level for level in table.levels if level in measured] or list(table.levels)
    shown = [[row[level] for level in levels] for row in losses]
    logs = [math.log(max(x.error if x.kl is None else x.kl, 1e-12)) for row in shown for x in row]
    low, span = min(logs), (max(logs) - min(logs)) or 1.0
    heat = iter([(value - low) / span for value in logs])
    rows = tuple(
        (LinearGroup(group.names).label, tuple((x.kl, x.error, next(heat)) for x in row))
        for group, row in zip(table.groups, shown, strict=True)
    )
    return LossMap(table.base, tuple(map(str, levels)), rows, bool(measured))


def rate_map(runs: Sequence[Run]) -> RateMap | None:
    """The map of SrCr, by whole percent of sparsity and tenths of a bit; None below two cells."""
    cells: dict[tuple[int, float], list[tuple[float, int]]] = {}
    for index, run in enumerate(runs):
        rates, srcr = run.rates, run.evaluation.srcr if run.evaluation else None
        if rates and srcr is not None and math.isfinite(srcr):
            key = round(100 * rates.sparsity), round(rates.bits, 1)
            cells.setdefault(key, []).append((srcr, index))
    if len(cells) < 2:
        return None
    values = [value for cell in cells.values() for value, _ in cell]
    sparsities = tuple(sorted({s for s, _ in cells}))
    return RateMap(
        sparsities,
        tuple(
            (bits, tuple(tuple(sorted(cells.get((s, bits), ()), reverse=True)) for s in sparsities))
            for bits in sorted({bits for _, bits in cells}, reverse=True)
        ),
        min(values),
        max(values),
    )


def _rate(show: Callable[[Rates], Cell]) -> Callable[[Run], Cell]:
    return lambda run: show(run.rates) if run.rates else NOTHING


def _bytes(n_bytes: int, base: int) -> Cell:
    return Cell(format_bytes(n_bytes), smaller(base, n_bytes), n_bytes)


def _entropy(rates: Rates) -> Cell:
    bits = rates.entropy_bits
    return NOTHING if bits is None else Cell(number(bits), sort=bits)


def _kl(run: Run) -> Cell:
    divergence = run.evaluation.divergence if run.evaluation else None
    if divergence is None:
        return NOTHING
    return Cell(number(divergence.kl.value), numbers(divergence.kl.ci95), divergence.kl.value)


def _top1(run: Run) -> Cell:
    divergence = run.evaluation.divergence if run.evaluation else None
    return (
        _share(divergence.top1_agreement.value, divergence.top1_agreement.ci95)
        if divergence
        else NOTHING
    )


def _sr(run: Run) -> Cell:
    evaluation = run.evaluation
    return _share(evaluation.sr, evaluation.sr_ci95) if evaluation else NOTHING


def _srcr(run: Run) -> Cell:
    evaluation = run.evaluation
    if evaluation is None or evaluation.srcr is None:
        return NOTHING
    return Cell(f"{evaluation.srcr:.3f}", numbers(evaluation.srcr_ci95), evaluation.srcr)


def _speed(run: Run) -> Cell:
    speed = run.evaluation.speed if run.evaluation else None
    if speed is None:
        return NOTHING
    ratio = speed.decode.ratio
    return Cell(f"{number(ratio.value)}{NBSP}×", numbers(ratio.ci95), ratio.value)


def _semantic(run: Run) -> Cell:
    semantic = run.evaluation.semantic if run.evaluation else None
    return _share(semantic.consistency, semantic.ci95) if semantic else NOTHING


def _share(value: float | None, ci95: Interval | None) -> Cell:
    return NOTHING if value is None else Cell(percent(value), percents(ci95), value)


def _text(show: Callable[[Run], str]) -> Callable[[Run], Cell]:
    return lambda run: Cell(show(run), sort=show(run))


COLUMNS = (
    Column("KL", "Mean KL(base ‖ compressed) in nats a token; 0 is identical, lower is better.", _kl),
    Column("Same top-1", "Share of positions where both models rank the same token first.", _top1),
    Column("Sr", "Semantic retention: score above chance kept, mean over tasks; 100 % is the base.", _sr),
    Column("Stored", "Weight files on disk, everything in them.",
           _rate(lambda r: _bytes(r.stored_bytes, r.base_bytes))),
    Column("Loaded", "What the engine named below keeps in memory for all weights.",
           _rate(lambda r: _bytes(r.loaded_bytes, r.base_bytes))),
    Column("Mode", "How each layer was solved, in one pass (joint) or in turn, and with which methods.",
           lambda run: Cell(mode(run), method(run), mode(run)), numeric=False),
    Column("Sparsity", "Share of the block linears' weights that the plan prunes to zero.",
           _rate(lambda r: Cell(percent(r.sparsity), sort=r.sparsity))),
    Column("Bits", "Bits of a kept weight, mean over the block linears; 16 is not quantized.",
           _rate(lambda r: Cell(number(r.bits), sort=r.bits))),
    Column("Group", "How many weights share a scale; channel: a whole row.", _text(group),
           numeric=False),
    Column("Structure", "The pattern of the zeros; N:M keeps N of every M neighbours.",
           _text(structure), numeric=False),
    Column("TCr", "Theoretical compression rate, 1 − (1 − s) q / 16 over the block linears. It is not "
           "bytes: scales, embeddings and the cost of marking zeros are outside.",
           _rate(lambda r: Cell(percent(r.tcr, 2), sort=r.tcr))),
    Column("Theoretical", "1 − TCr: the size that TCr credits, in percent of the 16-bit block linears.",
           _rate(lambda r: Cell(percent(1 - r.tcr, 2), sort=1 - r.tcr))),
    Column("Entropy bits", "Bits a weight that an ideal entropy coder of the codes would need.",
           _rate(_entropy)),
    Column("SrCr", "Sr times how strongly the model was compressed, from 0 to 1; higher is better.",
           _srcr),
    Column("Semantic", "Semantic consistency: similarity of both models' continuations of the same "
           "prompts.", _semantic),
    Column("Writing", "Tokens a second over the base's, when writing behind a prompt.", _speed),
)  # fmt: skip
#: What the base itself has in these columns.
BASE = {
    "KL": "0", "Same top-1": percent(1), "Sr": percent(1), "Sparsity": percent(0), "Bits": "16",
    "TCr": percent(0, 2), "Theoretical": percent(1, 2), "Semantic": percent(1), "Writing": f"1{NBSP}×",
}  # fmt: skip


def columns(runs: Sequence[Run]) -> list[Column]:
    """The columns that any of the runs has something in."""
    return [column for column in COLUMNS if any(column.cell(run) != NOTHING for run in runs)]


def base_row(shown: Sequence[Column], rates: Rates) -> list[str]:
    """The base as a row of the table."""
    size = format_bytes(rates.base_bytes)
    known = BASE | {"Stored": size, "Loaded": size}
    return [known.get(column.title, "–") for column in shown]


def summary(run: Run) -> str:
    """What a run kept, in a line: KL, the share of the same top-1 tokens, and Sr, where they are known."""
    cells = (("KL", _kl(run)), ("same top-1", _top1(run)), ("Sr", _sr(run)))
    return ", ".join(f"{name} {cell.text}" for name, cell in cells if cell != NOTHING)
