"""Results as tables on the terminal."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from srcr.cli.layout import TitledTable, folded, show, without_prefix
from srcr.environment import format_bytes
from srcr.models.topology import LinearGroup
from srcr.plans.plan import CompressionPlan
from srcr.plans.specs import CompressionLevel
from srcr.records.card import label, labels
from srcr.records.estimate import Interval
from srcr.records.evaluation import Evaluation
from srcr.records.inspection import InspectedBlock, Inspection
from srcr.records.preview import Preview
from srcr.records.run import Rates, RunRecord
from srcr.records.search import SearchResult
from srcr.records.sensitivity import SensitivityTable
from srcr.records.verification import VerificationResult

#: Layers shown with their output error.
WORST_LAYERS = 5


def compression(record: RunRecord, out: Path) -> None:
    """What a compression did, and where it lies."""
    table = TitledTable(f"{record.base} -> {out}", "", "")
    embeddings = record.embeddings or ()
    for row in (
        *_rate_rows(record.rates),
        *((each.name, each.summary) for each in record.structures or ()),
        *((each.name, f"{each.bits} bits, error {each.error:.2e}") for each in embeddings),
        *(("trained", each.summary) for each in record.recoveries or ()),
        ("format", record.format),
        ("time", f"{record.seconds:.1f} s"),
        ("peak memory", format_bytes(record.peak_memory_bytes)),
    ):
        table.add_row(*row)
    show(table)
    if not record.layers:  # structures went, and nothing else
        return
    worst = sorted(record.layers, key=lambda layer: -layer.error)[:WORST_LAYERS]
    layers = TitledTable(
        "layers with the largest output error", "layer", "sparsity", "bits", "error"
    )
    for layer in worst:
        bits = str(layer.bits)
        layers.add_row(layer.name, f"{100 * layer.sparsity:.1f} %", bits, f"{layer.error:.2e}")
    show(layers)


def preview(wanted: Preview) -> None:
    """What a command would come to."""
    table = TitledTable(f"srcr {wanted.command} {wanted.model}, not run", "", "about")
    rates = (
        ("theoretical compression rate (TCr)", wanted.tcr, 100, " %"),
        ("sparsity (pruned)", wanted.sparsity, 100, " %"),
        ("bits a kept weight", wanted.bits, 1, ""),
    )
    for name, value, factor, unit in rates:
        if value is not None:
            table.add_row(name, f"{factor * value:.4g}{unit}")
    sizes = (
        ("weight files, base", wanted.base_bytes),
        ("weight files, stored", wanted.stored_bytes),
        ("weights in memory, as stored", wanted.loaded_bytes),
        ("memory of the run, at least", wanted.memory_bytes),
        ("memory that is free", wanted.free_memory_bytes),
        ("disk that the run writes", wanted.disk_bytes),
        ("disk that is free", wanted.free_disk_bytes),
    )
    for name, size in sizes:
        if size is not None:
            table.add_row(name, format_bytes(size))
    if wanted.seconds is not None:
        table.add_row("time, roughly", _rough_time(wanted.seconds))
    groups = ", ".join(f"{size}: {count} layers" for size, count in wanted.group_sizes.items())
    for name, text in (
        ("columns that share a scale", groups),
        ("text", wanted.text),
        ("format", wanted.format),
    ):
        if text:
            table.add_row(name, text)
    show(table)
    for note in wanted.notes:
        show(f"note: {note}")


def _rough_time(seconds: float) -> str:
    """A time without more digits than an estimate has."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return (
                f"{seconds / size:.2g} {unit}"
                if seconds < 100 * size
                else f"{seconds / size:.0f} {unit}"
            )
    return f"{seconds:.0f} s" if seconds < 10 else f"{round(seconds, -1):.0f} s"


def verification(result: VerificationResult) -> None:
    """What each engine says of a checkpoint."""
    table = TitledTable(
        f"{result.folder} ({result.format}), {result.tokens} tokens",
        "engine", "outcome", "logits apart", "allowed", "same top-1",
    )  # fmt: skip
    for check in result.checks:
        measured = ["" if n is None else f"{n:.2g}" for n in (check.difference, check.tolerance)]
        agreement = check.top1_agreement
        measured.append("" if agreement is None else f"{100 * agreement:.1f} %")
        outcome = check.outcome if check.reason is None else f"{check.outcome}: {check.reason}"
        table.add_row(check.engine, outcome, *measured)
    show(table)


def recovery(record: RunRecord, out: Path) -> None:
    """What training gave back, and where it lies."""
    last = (record.recoveries or ())[-1]
    table = TitledTable(f"{last.source} -> {out}", "", "")
    change = "lower" if last.accepted else "no gain beyond doubt: the model is as it was"
    for row in (
        ("KL on held-out text, before", _spread(last.before.value, last.before.ci95)),
        ("KL on held-out text, after", _spread(last.after.value, last.after.ci95)),
        ("difference, paired", f"{_spread(last.change.value, last.change.ci95)}, {change}"),
        ("steps, kept after", f"{last.steps}, {last.best_step}"),
        ("tokens trained on", f"{last.tokens}"),
        *((("stopped", last.stopped),) if last.stopped else ()),
        ("weight files, stored", format_bytes(record.rates.stored_bytes)),
        ("format", record.format),
        ("time", f"{record.seconds:.1f} s"),
        ("peak memory", format_bytes(record.peak_memory_bytes)),
    ):
        table.add_row(*row)
    show(table)


def export(record: RunRecord, out: Path) -> None:
    """What a compressed model takes in its new format, and where it lies."""
    table = TitledTable(f"{record.base} -> {out}", "", "")
    for row in (*_rate_rows(record.rates), ("format", record.format)):
        table.add_row(*row)
    show(table)


def _rate_rows(rates: Rates) -> list[tuple[str, str]]:
    return [
        ("theoretical compression rate (TCr)", f"{100 * rates.tcr:.2f} %"),
        ("sparsity (pruned)", f"{100 * rates.sparsity:.2f} %"),
        ("zeros (pruned or rounded to 0)", f"{100 * rates.zeros:.2f} %"),
        ("bits a kept weight", f"{rates.bits:g}"),
        ("weight files, base", format_bytes(rates.base_bytes)),
        ("weight files, stored", format_bytes(rates.stored_bytes)),
        (f"weights in memory ({rates.engine})", format_bytes(rates.loaded_bytes)),
    ]


def evaluation(evaluations: Sequence[Evaluation]) -> None:
    """Each compressed model against the base: sizes, divergence, and where measured tasks and meaning."""
    first = evaluations[0]
    title = f"against {label(first.base)}"
    if first.text is not None:
        text = first.text
        title += f", on {text.size} of {text.source} (95 % intervals)"
    if first.divergence is not None:
        title += f", perplexity {first.divergence.perplexity.base:.3f}"
    columns = ("TCr", "stored", "loaded", "KL", "top-1", "perplexity")
    table = TitledTable(title, "model", *columns)
    names = labels([each.compressed for each in evaluations])
    for name, each in zip(names, evaluations, strict=True):
        perplexity = ""
        if each.divergence is not None:
            perplexity = f"{each.divergence.perplexity.compressed:.3f}"
        table.add_row(name, *_measure_cells(each), perplexity)
    show(table)
    if any(each.tasks or each.semantic for each in evaluations):
        show(_retention_table(evaluations))
    if any(each.speed for each in evaluations):
        show(_speed_table(evaluations))


def _measure_cells(each: Evaluation) -> list[str]:
    """TCr, stored and loaded bytes, KL and top-1 agreement."""
    rates, divergence = each.rates, each.divergence
    sizes = [
        f"{100 * rates.tcr:.2f} %",
        format_bytes(rates.stored_bytes),
        f"{format_bytes(rates.loaded_bytes)}\n({rates.engine})",
    ]
    if divergence is None:
        return [*sizes, "", ""]
    kl, top1 = divergence.kl, divergence.top1_agreement
    spreads = _spread(kl.value, kl.ci95), _percent(top1.value, top1.ci95)
    return [*sizes, *(spread.replace(" [", "\n[") for spread in spreads)]


def _retention_table(evaluations: Sequence[Evaluation]) -> TitledTable:
    """What was kept: a row a measure, a column a candidate."""
    names = labels([each.compressed for each in evaluations])
    table = TitledTable("what was kept (1 is all of it)", "", *names)
    if any(each.tasks for each in evaluations):
        sr = (_spread(each.sr, each.sr_ci95) for each in evaluations)
        table.add_row("Sr, mean retention", *sr, style="bold")
        srcr = (_spread(each.srcr, each.srcr_ci95) for each in evaluations)
        table.add_row("SrCr, with compression", *srcr, style="bold")
    for name, task in evaluations[0].tasks.items():
        scores = [each.tasks[name] for each in evaluations]
        table.add_row(
            f"{name} (base {task.base:.3f}, chance {task.chance:.3f})",
            *(f"{t.compressed:.3f}: {_spread(t.retention, t.ci95)}" for t in scores),
        )
    meanings = [each.semantic for each in evaluations if each.semantic is not None]
    if meanings:
        alike = "undefined (all texts alike)"
        cells = (_spread(s.normalised, s.normalised_ci95, alike) for s in meanings)
        table.add_row(f"semantic, over chance ({meanings[0].scorer})", *cells)
    return table


def _speed_table(evaluations: Sequence[Evaluation]) -> TitledTable:
    """Tokens a second of every candidate, and over the base's."""
    speeds = [each.speed for each in evaluations if each.speed is not None]
    first, names = speeds[0], labels([each.compressed for each in evaluations])
    title = (
        f"tokens a second in transformers, {first.dtype}, {first.device}, {first.threads} threads, "
        "a sequence at a time"
    )
    table = TitledTable(title, "", "base", *names)
    for what, part in (
        (f"reading {first.prompt_len} tokens", "prefill"),
        (f"writing {first.new_tokens}", "decode"),
    ):
        rows = [getattr(speed, part) for speed in speeds]
        cells = (
            f"{row.compressed:.0f}: {row.ratio.value:.2f} x [{row.ratio.low:.2f}, {row.ratio.high:.2f}]"
            for row in rows
        )
        table.add_row(what, f"{rows[0].base:.0f}", *cells)
    return table


def _spread(
    value: float | None, ci95: Interval | None, undefined: str = "undefined (base at chance)"
) -> str:
    """A value and its interval."""
    if value is None or ci95 is None:
        return undefined
    return f"{value:.4f} [{ci95[0]:.4f}, {ci95[1]:.4f}]"


def _percent(value: float, ci95: Interval) -> str:
    return f"{100 * value:.1f} % [{100 * ci95[0]:.1f}, {100 * ci95[1]:.1f}]"


def inspection(model: Inspection) -> None:
    """A model's blocks, and the linears that share an input."""
    show(
        f"{model.model}: {model.architecture}, {model.parameters:,} parameters "
        f"({model.linear_parameters:,} in {len(model.blocks)} blocks' linear layers), "
        f"{model.dtype}, {format_bytes(model.base_bytes)} on disk; output head "
        f"{model.output_head}{' (tied)' if model.tied_embeddings else ''}"
    )
    for each in model.embeddings:
        show(f"{each.name}: {'x'.join(map(str, each.shape))}, {each.bits} bits")
    table = TitledTable(
        "linears of each block that share an input", "block", "linears", "shapes", words=True
    )
    rows = [(block.name, _units(block)) for block in model.blocks]
    for name, units in folded(rows):
        for number, (linears, shapes) in enumerate(units):
            table.add_row("" if number else name, linears, shapes)
    show(table)


def _units(block: InspectedBlock) -> tuple[tuple[str, str], ...]:
    """The linears of each group of a block, without its name, and their shapes; those that follow each other
    and are of one shape once."""
    rows = []
    for group in block.units:
        names = [name.removeprefix(block.name + ".") for name in group.linears]
        shapes = ["x".join(map(str, shape)) for shape in group.shapes]
        same = len(set(shapes)) == 1 and len(shapes) > 1
        shown = f"{shapes[0]} (× {len(shapes)})" if same else ", ".join(shapes)
        rows.append((", ".join(names), shown))
    return tuple(rows)


def methods(rows: Sequence[dict[str, Any]]) -> None:
    """Every method."""
    table = TitledTable("methods", "kind", "name", "compensates", "summary", "paper", words=True)
    for row in rows:
        table.add_row(
            row["kind"],
            row["name"],
            "yes" if row["compensates"] else "no",
            row["summary"],
            row["paper"],
        )
    show(table)


def sensitivity(table: SensitivityTable, out: Path) -> None:
    """What each group of linears loses at some levels."""
    shown = _shown_levels(table)
    prefix, names = without_prefix([LinearGroup(group.names).label for group in table.groups])
    rows = TitledTable(
        f"{table.base}: what groups lose at some levels (output error; KL where measured) -> {out}",
        f"group of {prefix}" if prefix else "group", "weights", *(str(level) for level in shown),
    )  # fmt: skip
    for name, group in zip(names, table.groups, strict=True):
        losses = {loss.level: loss for loss in group.losses}
        cells = []
        for level in shown:
            loss = losses[level]
            kl = "" if loss.kl is None else f"\nKL {loss.kl:.2g}"
            cells.append(f"{loss.error:.1e}{kl}")
        rows.add_row(name, str(group.size), *cells)
    show(rows)


def _shown_levels(table: SensitivityTable) -> list[CompressionLevel]:
    """The levels that fit on a terminal: those with a KL, else three."""
    measured = {
        loss.level for group in table.groups for loss in group.losses if loss.kl is not None
    }
    return sorted(measured)[:4] or list(table.levels[:: max(1, len(table.levels) // 3)][:3])


def plan(compression: CompressionPlan, out: Path) -> None:
    """The levels of a plan, and how many layers have each."""
    rows = TitledTable(f"plan -> {out}", "sparsity", "bits", "layers")
    count = Counter((round(layer.sparsity, 3), layer.bits) for layer in compression.layers)
    for (sparsity, bits), layers in sorted(count.items()):
        rows.add_row(f"{100 * sparsity:.4g} %", str(bits), str(layers))
    show(rows)


def search(result: SearchResult, out: Path) -> None:
    """Every finalist on text that nothing before has seen, the chosen one marked."""
    rows = TitledTable(
        f"{result.model} -> {out}: {result.trials} candidates measured, {result.seconds:.0f} s",
        "finalist", "TCr", "stored", "loaded", "KL on unseen text", "same top-1",
    )  # fmt: skip
    for finalist in result.finalists:
        chosen = finalist.compressed == result.chosen
        name = finalist.compressed + (" (chosen)" if chosen else "")
        rows.add_row(name, *_measure_cells(finalist), style="bold" if chosen else "")
    show(rows)
