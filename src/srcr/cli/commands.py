"""The commands: what they are given becomes the arguments of a public function, and its result is shown."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from srcr.cli import evaluate_parameters as measuring
from srcr.cli import parameters as given
from srcr.cli.app import Command, app, command_line, given_only, print_json, show_preview
from srcr.errors import InputError


@app.command(cls=Command)
def inspect(model: given.Model, as_json: given.Json = False) -> None:
    """Show what srcr sees in a model: blocks, linear layers, which share an input, bytes."""
    from srcr.cli import tables
    from srcr.pipelines.inspect import inspect as run
    from srcr.serialize import to_dict

    inspection = run(model)
    if as_json:
        print_json(to_dict(inspection))
    else:
        tables.inspection(inspection)


@app.command(cls=Command)
def compress(
    model: given.ModelOrConfig = None,
    out: given.OutOrConfig = None,
    sparsity: given.Sparsity = None,
    structure: given.Structure = None,
    bits: given.Bits = None,
    group_size: given.GroupSize = None,
    symmetric: given.Symmetric = None,
    prune_method: given.PruneMethod = None,
    quant_method: given.QuantMethod = None,
    mode: given.Mode = None,
    targets: given.Targets = None,
    ignore: given.Ignore = None,
    embeddings: given.Embeddings = None,
    remove: given.Remove = None,
    plan: given.Plan = None,
    config: given.Config = None,
    calibration: given.Source = None,
    samples: given.Samples = None,
    seq_len: given.SeqLen = None,
    format: given.Format = None,
    memory: given.Memory = None,
    recover: given.Recover = None,
    resume: given.Resume = False,
    overwrite: given.Overwrite = False,
    dry_run: given.DryRun = False,
    allow_requantize: given.Requantize = None,
    seed: given.Seed = None,
    device: given.Device = None,
    cache: given.Cache = None,
    as_json: given.Json = False,
) -> None:
    """Prune and quantize a model in one pass and write a checkpoint that transformers loads."""
    arguments = locals()
    from srcr.cli import tables
    from srcr.cli.options import Options
    from srcr.pipelines.compress import compress as run
    from srcr.pipelines.options import Output
    from srcr.serialize import to_dict

    options = Options.of(arguments, config)
    base, folder = options.place()
    output = Output(folder, options.format, overwrite, resume)
    wanted = (
        base, output, options.compression(), options.data(), options.run(command_line()),
        options.recovery(),
    )  # fmt: skip
    if dry_run:
        from srcr.pipelines.preview import preview_compression

        show_preview(preview_compression(*wanted), as_json)
        return
    record = run(*wanted)
    options.write_run(record.format)
    if as_json:
        print_json(to_dict(record) | {"out": str(folder)})
    else:
        tables.compression(record, folder)


@app.command(cls=Command)
def export(
    folder: given.Folder,
    out: given.Out,
    format: given.ExportFormat,
    overwrite: given.Overwrite = False,
    as_json: given.Json = False,
) -> None:
    """Convert a compressed model to another format: the same weights, in other files."""
    from srcr.cli import tables
    from srcr.pipelines.export import export as run
    from srcr.pipelines.options import Output, RunOptions
    from srcr.serialize import to_dict

    record = run(folder, Output(out, format, overwrite), RunOptions(command=command_line()))
    if as_json:
        print_json(to_dict(record) | {"out": str(out)})
    else:
        tables.export(record, out)


@app.command(cls=Command)
def verify(
    folder: given.Folder,
    engines: Annotated[
        str | None,
        typer.Option(
            help="The engines to ask, with commas between: transformers, llama.cpp, vllm. "
            "Without it: all that are installed.",
            show_default=False,
            metavar="NAMES",
        ),
    ] = None,
    as_json: given.Json = False,
) -> None:
    """Load a compressed model in every engine that runs here, and compare what it predicts."""
    from srcr.cli import tables
    from srcr.pipelines.options import RunOptions
    from srcr.pipelines.verify import verify as run
    from srcr.serialize import to_dict

    names = None if engines is None else tuple(engines.split(","))
    result = run(folder, names, RunOptions(command=command_line()))
    if as_json:
        print_json(to_dict(result))
    else:
        tables.verification(result)
    if not result.passed:
        raise SystemExit(1)


@app.command(cls=Command)
def evaluate(
    base: given.Base,
    compressed: measuring.Compressed,
    out: measuring.JsonFile = None,
    text: measuring.Text = None,
    samples: measuring.TextSamples = None,
    seq_len: given.TextLength = None,
    tasks: measuring.Tasks = None,
    limit: given.Limit = None,
    semantic: measuring.Semantic = False,
    prompts: measuring.Prompts = None,
    prompt_len: measuring.PromptLength = None,
    new_tokens: measuring.NewTokens = None,
    scorer: measuring.Scorer = None,
    speed: measuring.Speed = False,
    report: measuring.Report = False,
    overwrite: given.Overwrite = False,
    seed: given.Seed = None,
    device: given.Device = None,
    cache: given.Cache = None,
    as_json: given.Json = False,
) -> None:
    """Measure what compressed models kept of the original, with 95 % intervals."""
    from srcr.cli import tables
    from srcr.cli.options import split_names
    from srcr.data.specs import EvaluationText
    from srcr.metrics.speed import SpeedSpec
    from srcr.metrics.tasks import TaskSpec
    from srcr.pipelines.evaluate import evaluate as run
    from srcr.pipelines.options import RunOptions
    from srcr.report import check_results, write_results
    from srcr.serialize import to_dict

    if limit is not None and tasks is None:
        raise InputError(f"--limit {limit} is a number of items a task: name the --tasks too")
    check_results(out, compressed if report else [], overwrite)
    evaluations = run(
        base,
        compressed,
        EvaluationText(**given_only({"source": text, "samples": samples, "seq_len": seq_len})),
        None if tasks is None else TaskSpec(split_names(tasks), limit),
        _semantic_spec(semantic, prompts, prompt_len, new_tokens, scorer),
        RunOptions(**given_only({"seed": seed, "device": device, "cache": cache})),
        SpeedSpec() if speed else None,
    )
    evaluations = [dataclasses.replace(each, command=command_line()) for each in evaluations]
    write_results(evaluations, out, report)
    if as_json:
        data = [to_dict(each) for each in evaluations]
        print_json(data[0] if len(data) == 1 else data)
    else:
        tables.evaluation(evaluations)


def _semantic_spec(
    asked: bool,
    prompts: int | None,
    prompt_len: int | None,
    new_tokens: int | None,
    scorer: str | None,
) -> Any:
    """What ``--semantic`` and the options that belong to it ask for; None without it."""
    from srcr.metrics.specs import SemanticSpec
    from srcr.serialize import from_dict

    values = given_only(
        {"n": prompts, "prompt_len": prompt_len, "max_new_tokens": new_tokens, "scorer": scorer}
    )
    if values and not asked:
        raise InputError(
            "--prompts, --prompt-len, --new-tokens and --scorer belong to --semantic: add it"
        )
    return from_dict(SemanticSpec, values, where="the command line") if asked else None


@app.command(cls=Command)
def report(
    results: Annotated[
        list[Path],
        typer.Argument(metavar="RESULT...", help="Compressed folders, or JSON of 'srcr evaluate'."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file.")] = Path("report.html"),
    overwrite: given.Overwrite = False,
) -> None:
    """Build one self-contained HTML page: how much smaller, and what was kept."""
    from srcr.report import write_report

    write_report(results, out, overwrite)
    typer.echo(f"report: {out}")


@app.command(cls=Command)
def methods(as_json: given.Json = False) -> None:
    """List the pruning and quantization methods."""
    from srcr.cli import tables
    from srcr.methods import pruners, quantizers

    rows = [
        {"kind": kind, "name": m.name, "compensates": m.compensates, "summary": m.summary,
         "paper": m.paper}
        for kind, known in (("prune", pruners()), ("quant", quantizers()))
        for m in known.values()
    ]  # fmt: skip
    if as_json:
        print_json({"methods": rows})
    else:
        tables.methods(rows)
