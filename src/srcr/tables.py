"""Results as tables on the terminal."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from srcr.card import labels, size
from srcr.types import CompressionPlan, RunRecord

if TYPE_CHECKING:
    from srcr.planning.levels import Level
    from srcr.planning.sensitivity import Table as Losses


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def compression(record: RunRecord, out: Path) -> None:
    """What a compression did, and where it lies."""
    rates = record.rates
    table = _table(f"{record.base} -> {out}", "", "")
    for row in (
        ("theoretical compression rate (TCr)", f"{100 * rates.tcr:.2f} %"),
        ("sparsity (pruned)", f"{100 * rates.sparsity:.2f} %"),
        ("zeros (pruned or rounded to 0)", f"{100 * rates.zeros:.2f} %"),
        ("bits a kept weight", f"{rates.bits:g}"),
        ("weight files, base", size(rates.base_bytes)),
        ("weight files, stored", size(rates.stored_bytes)),
        (f"weights in memory ({rates.engine})", size(rates.loaded_bytes)),
        ("format", record.format),
        ("time", f"{record.seconds:.1f} s"),
        ("peak memory", size(record.peak_memory_bytes)),
    ):
        table.add_row(*row)
    console = Console()
    console.print(table)
    worst = sorted(record.layers, key=lambda layer: -layer.error)[:5]
    layers = _table("layers with the largest output error", "layer", "sparsity", "bits", "error")
    for layer in worst:
        row_bits = str(layer.bits)
        layers.add_row(layer.name, f"{100 * layer.sparsity:.1f} %", row_bits, f"{layer.error:.2e}")
    console.print(layers)


def evaluation(reports: list[dict[str, Any]]) -> None:
    """Each compressed model against the base: sizes, divergence, and where measured tasks and meaning."""
    first = reports[0]
    text = first["text"]
    console = Console()
    title = (
        f"against {first['base']}, on {text['samples']} x {text['seq_len']} tokens of {text['source']} "
        "(95 % intervals)"
    )
    columns = ("TCr", "stored", "loaded", "KL", "same top-1", "perplexity")
    table = _table(title, "compressed", *columns)
    for name, report in zip(labels([r["compressed"] for r in reports]), reports, strict=True):
        rates, div = report["rates"], report["divergence"]
        ppl = div["perplexity"]
        table.add_row(
            name,
            f"{100 * rates['tcr']:.2f} %",
            size(rates["stored_bytes"]),
            f"{size(rates['loaded_bytes'])} ({rates['engine']})",
            _spread(div["kl"]["value"], div["kl"]["ci95"]),
            _percent(div["top1_agreement"]["value"], div["top1_agreement"]["ci95"]),
            f"{ppl['compressed']:.3f} (base {ppl['base']:.3f})",
        )
    console.print(table)
    if any(report["tasks"] or report["semantic"] for report in reports):
        console.print(_kept(reports))


def _kept(reports: list[dict[str, Any]]) -> Table:
    """What was kept: a row a measure, a column a candidate."""
    names = labels([report["compressed"] for report in reports])
    table = _table("what was kept (1 is all of it)", "", *names)
    for key, label in (("sr", "Sr, mean retention"), ("srcr", "SrCr, with compression")):
        if any(report["tasks"] for report in reports):
            cells = (_spread(r[key], r[f"{key}_ci95"]) for r in reports)
            table.add_row(label, *cells, style="bold")
    for name, task in reports[0]["tasks"].items():
        label = f"{name} (base {task['base']:.3f}, chance {task['chance']:.3f})"
        found = (report["tasks"][name] for report in reports)
        table.add_row(
            label,
            *(f"{t['compressed']:.3f}: {_spread(t['retention'], t['ci95'])}" for t in found),
        )
    if semantic := reports[0]["semantic"]:
        found = (report["semantic"] for report in reports)
        alike = "undefined (all texts alike)"
        cells = (_spread(s["normalised"], s["normalised_ci95"], alike) for s in found)
        table.add_row(f"semantic, over chance ({semantic['scorer']})", *cells)
    return table


def _spread(
    value: float | None, ci95: list[float] | None, undefined: str = "undefined (base at chance)"
) -> str:
    """A value and its interval."""
    if value is None or ci95 is None:
        return undefined
    return f"{value:.4f} [{ci95[0]:.4f}, {ci95[1]:.4f}]"


def _percent(value: float, ci95: list[float]) -> str:
    return f"{100 * value:.1f} % [{100 * ci95[0]:.1f}, {100 * ci95[1]:.1f}]"


def inspection(found: dict[str, Any]) -> None:
    """A model's blocks and units."""
    console = Console()
    console.print(
        f"{found['model']}: {found['architecture']}, {found['parameters']:,} parameters "
        f"({found['linear_parameters']:,} in {len(found['blocks'])} blocks' linear layers), "
        f"{found['dtype']}, {size(found['base_bytes'])} on disk; output head "
        f"{found['output_head']}{' (tied)' if found['tied_embeddings'] else ''}"
    )
    table = _table("linears of each block that share an input", "block", "linears", "shapes")
    for block in found["blocks"]:
        for i, unit in enumerate(block["units"]):
            names = [name.removeprefix(block["name"] + ".") for name in unit["linears"]]
            shapes = ", ".join("x".join(map(str, shape)) for shape in unit["shapes"])
            table.add_row(block["name"] if i == 0 else "", ", ".join(names), shapes)
    console.print(table)


def methods(rows: list[dict[str, Any]]) -> None:
    """Every method."""
    table = _table("methods", "kind", "name", "compensates", "summary", "paper")
    for row in rows:
        table.add_row(
            row["kind"],
            row["name"],
            "yes" if row["compensates"] else "no",
            row["summary"],
            row["paper"],
        )
    Console().print(table)


def sensitivity(table: "Losses", out: Path) -> None:
    """What each unit loses, those that lose most first."""
    from srcr.planning.levels import Decision

    rows = _table(
        f"{table.base}: what units lose at some levels (output error; KL where measured) -> {out}",
        "unit", "weights", *(str(level) for level in _shown(table)),
    )  # fmt: skip
    for unit in table.units:
        cells = []
        for level in _shown(table):
            loss = next(loss for loss in unit.losses if loss.level == level)
            kl = "" if loss.kl is None else f" (KL {loss.kl:.2g})"
            cells.append(f"{loss.error:.1e}{kl}")
        rows.add_row(Decision(unit.names).label, str(unit.size), *cells)
    Console().print(rows)


def _shown(table: "Losses") -> "list[Level]":
    """The levels that fit on a terminal: those with a KL, else three."""
    measured = {loss.level for unit in table.units for loss in unit.losses if loss.kl is not None}
    return sorted(measured)[:4] or list(table.levels[:: max(1, len(table.levels) // 3)][:3])


def plan(found: CompressionPlan, out: Path) -> None:
    """The levels of a plan, and how many layers have each."""
    rows = _table(f"plan -> {out}", "sparsity", "bits", "layers")
    count = Counter((round(layer.sparsity, 3), layer.bits) for layer in found.layers)
    for (sparsity, bits), layers in sorted(count.items()):
        rows.add_row(f"{100 * sparsity:.4g} %", str(bits), str(layers))
    Console().print(rows)


def search(found: dict[str, Any], out: Path) -> None:
    """Every finalist on text that nothing before has seen, the chosen one marked."""
    rows = _table(
        f"{found['model']} -> {out}: {found['trials']} candidates measured, {found['seconds']:.0f} s",
        "finalist", "TCr", "stored", "loaded", "KL on unseen text", "same top-1",
    )  # fmt: skip
    for one in found["finalists"]:
        rates, div = one["rates"], one["divergence"]
        chosen = one["compressed"] == found["chosen"]
        rows.add_row(
            one["compressed"] + (" (chosen)" if chosen else ""),
            f"{100 * rates['tcr']:.2f} %",
            size(rates["stored_bytes"]),
            f"{size(rates['loaded_bytes'])} ({rates['engine']})",
            _spread(div["kl"]["value"], div["kl"]["ci95"]),
            _percent(div["top1_agreement"]["value"], div["top1_agreement"]["ci95"]),
            style="bold" if chosen else "",
        )
    Console().print(rows)
