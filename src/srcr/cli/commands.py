"""The commands: what they are given becomes the arguments of a public function, and its result is shown."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from typing_extensions import TypedDict, Unpack

from srcr.cli import parameters as given
from srcr.cli.app import command, command_line, print_json, show_preview
from srcr.cli.evaluate_parameters import Evaluate
from srcr.cli.option import OUTPUT, WEIGHTS, option
from srcr.errors import InputError
from srcr.plans.settings import RecipeSettings


class Inspect(given.Model, given.Json):
    """What 'srcr inspect' is given."""


@command
def inspect(**options: Unpack[Inspect]) -> None:
    """Show what srcr sees in a model: blocks, linear layers, which share an input, bytes."""
    from srcr.cli import tables
    from srcr.pipelines.inspect import inspect as run
    from srcr.serialize import to_dict

    inspection = run(options["model"])
    if options.get("as_json"):
        print_json(to_dict(inspection))
    else:
        tables.inspection(inspection)


class Planned(TypedDict, total=False):
    """What stands for the settings of a recipe."""

    plan: Annotated[
        Path,
        option(WEIGHTS, "A plan for each layer, instead of one for all.", metavar="FILE"),
    ]


class Compress(
    given.Model, given.Out, given.Written, given.Format, RecipeSettings, Planned,
    given.Calibrating, given.Training, given.Memory, given.Resume, given.Requantize, given.Running,
):  # fmt: skip
    """What 'srcr compress' is given."""


@command
def compress(**options: Unpack[Compress]) -> None:
    """Prune and quantize a model in one pass and write a checkpoint that transformers loads."""
    from srcr.cli import options as read
    from srcr.cli import tables
    from srcr.pipelines.compress import compress as run
    from srcr.serialize import to_dict

    wanted = (
        options["model"], read.output_of(options), read.compression_of(options),
        read.calibration_of(options), read.run_of(options), read.recovery_of(options),
    )  # fmt: skip
    if options.get("dry_run"):
        from srcr.pipelines.preview import preview_compression

        show_preview(preview_compression(*wanted), options.get("as_json"))
        return
    record = run(*wanted)
    defaults = read.recipe_defaults(options) | read.text_defaults(options)
    read.write_run("compress", options, defaults | {"format": record.format})
    if options.get("as_json"):
        print_json(to_dict(record) | {"out": str(options["out"])})
    else:
        tables.compression(record, options["out"])


class Target(TypedDict):
    """What a result is converted to."""

    format: Annotated[
        str,
        option(
            OUTPUT,
            "The format to convert to: archive, compressed-tensors, dense, gguf or gptq.",
            metavar="NAME",
        ),
    ]


class Export(given.Folder, given.Out, Target, given.Written):
    """What 'srcr export' is given."""


@command
def export(**options: Unpack[Export]) -> None:
    """Convert a compressed model to another format: the same weights, in other files."""
    from srcr.cli import tables
    from srcr.cli.options import output_of
    from srcr.pipelines.export import export as run
    from srcr.pipelines.options import RunOptions
    from srcr.serialize import to_dict

    record = run(options["folder"], output_of(options), RunOptions(command=command_line()))
    if options.get("as_json"):
        print_json(to_dict(record) | {"out": str(options["out"])})
    else:
        tables.export(record, options["out"])


class Engines(TypedDict, total=False):
    """Who is asked."""

    engines: Annotated[
        str,
        typer.Option(
            help="The engines to ask, with commas between: transformers, llama.cpp, vllm. "
            "Without it: all that are installed.",
            show_default=False,
            metavar="NAMES",
        ),
    ]


class Verify(given.Folder, Engines, given.Json):
    """What 'srcr verify' is given."""


@command
def verify(**options: Unpack[Verify]) -> None:
    """Load a compressed model in every engine that runs here, and compare what it predicts."""
    from srcr.cli import tables
    from srcr.pipelines.options import RunOptions
    from srcr.pipelines.verify import verify as run
    from srcr.serialize import to_dict

    engines = options.get("engines")
    names = None if engines is None else tuple(engines.split(","))
    result = run(options["folder"], names, RunOptions(command=command_line()))
    if options.get("as_json"):
        print_json(to_dict(result))
    else:
        tables.verification(result)
    if not result.passed:
        raise SystemExit(1)


@command
def evaluate(**options: Unpack[Evaluate]) -> None:
    """Measure what compressed models kept of the original, with 95 % intervals."""
    from srcr.cli import tables
    from srcr.cli.options import picked, run_of, split_names
    from srcr.data.specs import EvaluationText
    from srcr.metrics.speed import SpeedSpec
    from srcr.metrics.tasks import TaskSpec
    from srcr.pipelines.evaluate import evaluate as run
    from srcr.report import check_results, write_results
    from srcr.serialize import to_dict

    tasks, limit = options.get("tasks"), options.get("limit")
    if limit is not None and tasks is None:
        raise InputError(f"--limit {limit} is a number of items a task: name the --tasks too")
    out, report = options.get("out"), options.get("report", False)
    folders = options["compressed"]
    check_results(out, folders if report else [], options.get("overwrite", False))
    evaluations = run(
        options["base"],
        folders,
        EvaluationText(**picked(options, "samples", "seq_len", "chat", source="text")),
        None
        if tasks is None
        else TaskSpec(split_names(tasks), limit, chat=options.get("chat", False)),
        _semantic_spec(options),
        run_of(options),
        SpeedSpec() if options.get("speed") else None,
    )
    evaluations = [dataclasses.replace(each, command=command_line()) for each in evaluations]
    write_results(evaluations, out, report)
    if options.get("as_json"):
        data = [to_dict(each) for each in evaluations]
        print_json(data[0] if len(data) == 1 else data)
    else:
        tables.evaluation(evaluations)


def _semantic_spec(options: Evaluate) -> Any:
    """What ``--semantic`` and the options that belong to it ask for; None without it."""
    from srcr.cli.options import picked
    from srcr.metrics.specs import SemanticSpec
    from srcr.serialize import from_dict

    values = picked(options, "prompt_len", "scorer", n="prompts", max_new_tokens="new_tokens")
    if options.get("semantic"):
        return from_dict(SemanticSpec, values, where="the command line")
    if values:
        raise InputError(
            "--prompts, --prompt-len, --new-tokens and --scorer belong to --semantic: add it"
        )
    return None


class Report(TypedDict):
    """What a page is made of."""

    results: Annotated[
        list[Path],
        given.argument("RESULT...", "Compressed folders, or JSON of 'srcr evaluate'."),
    ]


class ReportFile(TypedDict, total=False):
    """The page."""

    out: Annotated[
        Path,
        option(OUTPUT, "The HTML file.", "--out", "-o", default="report.html", metavar="FILE"),
    ]


class Page(Report, ReportFile, given.Overwrite):
    """What 'srcr report' is given."""


@command
def report(**options: Unpack[Page]) -> None:
    """Build one self-contained HTML page: how much smaller, and what was kept."""
    from srcr.report import write_report

    out = options.get("out", Path("report.html"))
    write_report(options["results"], out, options.get("overwrite", False))
    typer.echo(f"report: {out}")


@command
def methods(**options: Unpack[given.Json]) -> None:
    """List the pruning and quantization methods."""
    from srcr.cli import tables
    from srcr.methods import pruners, quantizers

    rows = [
        {"kind": kind, "name": m.name, "compensates": m.compensates, "summary": m.summary,
         "paper": m.paper}
        for kind, known in (("prune", pruners()), ("quant", quantizers()))
        for m in known.values()
    ]  # fmt: skip
    if options.get("as_json"):
        print_json({"methods": rows})
    else:
        tables.methods(rows)
