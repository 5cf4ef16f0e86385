"""The command line: one thin command for each public function, same names, same defaults.

Results go to stdout (a table, or one JSON object with ``--json``), everything else to stderr. Exit codes:
0 done, 2 bad usage or input, 1 failed.
"""

import atexit
import ctypes
import gc
import json
import os
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from srcr.errors import InputError, NotAvailableYetError, SrcrError

app = typer.Typer(
    name="srcr",
    help="Make a causal language model much smaller, and prove how much of its meaning is left.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[str, typer.Argument(help="A folder, a hub id, or 'bundled'.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="The folder to write.", show_default=False)]
Sparsity = Annotated[
    float | None, typer.Option(help="Fraction of weights that become zero, 0 to 1. [default: 0]")
]
Structure = Annotated[
    str | None,
    typer.Option(help="unstructured, or N:M (N of every M are kept). [default: unstructured]"),
]
Bits = Annotated[int | None, typer.Option(help="2 to 8; 16 quantizes nothing. [default: 4]")]
GroupSize = Annotated[
    str | None,
    typer.Option(
        help="Columns that share a scale: auto (128 where it divides, else -1), -1 (the whole row) or "
        "a number. [default: auto]"
    ),
]
Symmetric = Annotated[
    bool | None,
    typer.Option(
        "--symmetric/--asymmetric", help="Without or with zero-points. [default: symmetric]"
    ),
]
PruneMethod = Annotated[str | None, typer.Option(help="See 'srcr methods'. [default: sparsegpt]")]
QuantMethod = Annotated[str | None, typer.Option(help="See 'srcr methods'. [default: gptq]")]
ModeOption = Annotated[
    str | None, typer.Option(help="joint, sequential-a or sequential-b. [default: joint]")
]
Plan = Annotated[Path | None, typer.Option(help="A plan for each layer, instead of one for all.")]
Config = Annotated[Path | None, typer.Option(help="A YAML file with these options by name.")]
Source = Annotated[
    str | None,
    typer.Option(
        help="bundled, self, a .txt, .jsonl, .parquet or .safetensors file, or "
        "hf:NAME[:CONFIG[:SPLIT[:COLUMN]]]. [default: self]"
    ),
]
FormatName = Annotated[
    str | None,
    typer.Option("--format", help="compressed-tensors or dense. [default: compressed-tensors]"),
]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random. [default: 0]")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda. [default: auto]")]
Memory = Annotated[
    str | None, typer.Option(help="Memory budget, as 4GB or 500MB. [default: half of what is free]")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue a killed run of the same settings.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result.")]

Sparsities = Annotated[
    str | None,
    typer.Option(
        help="Sparsities that a layer may have, comma-separated. [default: 0,0.1,0.2,0.25,0.3,0.4,0.5]"
    ),
]
Widths = Annotated[
    str | None,
    typer.Option(help="Bits that a layer may have, comma-separated. [default: 2,3,4,5,6,8]"),
]
TargetSize = Annotated[
    str | None, typer.Option(help="tcr=0.8125, stored=40MB or loaded=4GB.", show_default=False)
]
Database = Annotated[
    Path | None,
    typer.Option(help="Folder of the level database, to keep it. [default: removed at the end]"),
]
DatabaseLimit = Annotated[
    str | None, typer.Option(help="The most that the level database may take, as 2GB.")
]
Ray = Annotated[
    str | None,
    typer.Option(help="A Ray cluster that measures; 'local' starts one. [default: this process]"),
]
Samples = Annotated[int | None, typer.Option(help="Sequences. [default: 128]")]
SeqLen = Annotated[int | None, typer.Option(help="Tokens a sequence. [default: 512]")]


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))


def _command() -> str:
    return "srcr " + shlex.join(sys.argv[1:])


@app.command()
def inspect(model: Model, as_json: Json = False) -> None:
    """Show what srcr sees in a model: blocks, linear layers, which share an input, bytes."""
    from srcr import tables
    from srcr.evaluation import inspect as run

    found = run(model)
    if as_json:
        _print_json(found)
    else:
        tables.inspection(found)


@app.command()
def compress(
    model: Model,
    out: Out,
    sparsity: Sparsity = None,
    structure: Structure = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    symmetric: Symmetric = None,
    prune_method: PruneMethod = None,
    quant_method: QuantMethod = None,
    mode: ModeOption = None,
    plan: Plan = None,
    config: Config = None,
    calibration: Source = None,
    samples: Samples = None,
    seq_len: SeqLen = None,
    format_name: FormatName = None,
    memory: Memory = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    seed: Seed = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Prune and quantize a model in one pass and write a checkpoint that transformers loads."""
    from srcr import tables
    from srcr.compression import Output
    from srcr.compression import compress as run
    from srcr.options import Options
    from srcr.types import from_dict, to_dict

    given: dict[str, Any] = {
        "sparsity": sparsity, "structure": structure, "bits": bits, "group_size": group_size,
        "symmetric": symmetric, "prune_method": prune_method, "quant_method": quant_method,
        "mode": mode, "plan": None if plan is None else str(plan), "calibration": calibration,
        "samples": samples, "seq_len": seq_len, "format": format_name, "seed": seed, "device": device,
        "memory": memory,
    }  # fmt: skip
    options = from_dict(Options, given, where="the command line").over(config)
    try:
        record = run(
            model,
            options.treatment(),
            options.data(),
            Output(out, options.format, overwrite, resume),
            seed=options.seed,
            device=options.device or "auto",
            command=_command(),
            memory=options.memory,
        )
    except KeyboardInterrupt as error:  # typer would say nothing
        _fail(f"interrupted; {error or 'nothing was written'}", 1)
    if as_json:
        _print_json(to_dict(record) | {"out": str(out)})
    else:
        tables.compression(record, out)


def _numbers(text: str | None, option: str, kind: type[int] | type[float]) -> list[Any] | None:
    """Comma-separated numbers."""
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InputError(f"--{option} {text!r}: give numbers separated by commas") from None


def _resources(
    database: Path | None, limit: str | None, ray: str | None, memory: str | None
) -> Any:
    from srcr.memory import parse_size
    from srcr.planning.field import Resources

    return Resources(database, None if limit is None else parse_size(limit), ray, memory)


@app.command()
def sensitivity(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The JSON table.", show_default=False)],
    probes: Annotated[
        int | None,
        typer.Option(help="Levels at which the KL of the whole model is measured. [default: 3]"),
    ] = None,
    sparsities: Sparsities = None,
    widths: Widths = None,
    group_size: GroupSize = None,
    symmetric: Symmetric = None,
    prune_method: PruneMethod = None,
    quant_method: QuantMethod = None,
    config: Config = None,
    calibration: Source = None,
    samples: Samples = None,
    seq_len: SeqLen = None,
    database: Database = None,
    database_limit: DatabaseLimit = None,
    ray: Ray = None,
    memory: Memory = None,
    overwrite: Overwrite = False,
    seed: Seed = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure what each part of a model loses at each sparsity and width."""
    from srcr import tables
    from srcr.files import check_new_file, write_text
    from srcr.options import Options
    from srcr.planning.sensitivity import PROBES
    from srcr.planning.sensitivity import sensitivity as run
    from srcr.types import from_dict, to_dict

    check_new_file(out, overwrite)
    given: dict[str, Any] = {
        "sparsities": _numbers(sparsities, "sparsities", float),
        "widths": _numbers(widths, "widths", int), "group_size": group_size, "symmetric": symmetric,
        "prune_method": prune_method, "quant_method": quant_method, "calibration": calibration,
        "samples": samples, "seq_len": seq_len, "seed": seed, "device": device, "memory": memory,
    }  # fmt: skip
    options = from_dict(Options, given, where="the command line").over(config)
    table = run(
        model,
        options.space(),
        options.data(),
        PROBES if probes is None else probes,
        _resources(database, database_limit, ray, options.memory),
        options.seed or 0,
        options.device or "auto",
    )
    write_text(out, json.dumps(to_dict(table), indent=2, allow_nan=False) + "\n")
    if as_json:
        _print_json(to_dict(table))
    else:
        tables.sensitivity(table, out)


@app.command()
def plan(
    model: Model,
    target: TargetSize = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The YAML plan, for 'srcr compress --plan'.")
    ] = Path("plan.yaml"),
    table: Annotated[
        Path | None, typer.Option(help="A table of 'srcr sensitivity'. [default: made now]")
    ] = None,
    sparsities: Sparsities = None,
    widths: Widths = None,
    group_size: GroupSize = None,
    symmetric: Symmetric = None,
    prune_method: PruneMethod = None,
    quant_method: QuantMethod = None,
    config: Config = None,
    calibration: Source = None,
    samples: Samples = None,
    seq_len: SeqLen = None,
    format_name: FormatName = None,
    database: Database = None,
    database_limit: DatabaseLimit = None,
    ray: Ray = None,
    memory: Memory = None,
    overwrite: Overwrite = False,
    seed: Seed = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Give each part of a model the sparsity and width it deserves, at a size."""
    from srcr import tables
    from srcr.files import check_new_file, write_text
    from srcr.options import Options
    from srcr.planning.budget import parse_target
    from srcr.planning.plan import plan as run
    from srcr.planning.sensitivity import Table
    from srcr.types import from_dict, from_yaml, to_dict, to_yaml

    if target is None:
        raise InputError("a plan needs a size: --target tcr=0.8125, stored=40MB or loaded=4GB")
    size = parse_target(target)
    check_new_file(out, overwrite)
    known = None if table is None else from_yaml(Table, table)
    given: dict[str, Any] = {
        "sparsities": _numbers(sparsities, "sparsities", float),
        "widths": _numbers(widths, "widths", int), "group_size": group_size, "symmetric": symmetric,
        "prune_method": prune_method, "quant_method": quant_method, "calibration": calibration,
        "samples": samples, "seq_len": seq_len, "format": format_name, "seed": seed, "device": device,
        "memory": memory,
    }  # fmt: skip
    if known is not None:
        for name in (
            "sparsities",
            "widths",
            "group_size",
            "symmetric",
            "prune_method",
            "quant_method",
        ):
            if given[name] is not None:
                option = name.replace("_", "-")
                raise InputError(
                    f"--table decides {option}: leave --{option} out, or make another table"
                )
    options = from_dict(Options, given, where="the command line").over(config)
    found = run(
        model,
        size,
        options.space(),
        options.data(),
        known,
        options.format or "compressed-tensors",
        _resources(database, database_limit, ray, options.memory),
        options.seed or 0,
        options.device or "auto",
    )
    write_text(out, to_yaml(found))
    if as_json:
        _print_json(to_dict(found))
    else:
        tables.plan(found, out)


@app.command()
def search(
    model: Model,
    out: Out,
    target: TargetSize = None,
    constraint: Annotated[
        str | None,
        typer.Option(
            help="Instead of a target, what the smallest model must keep: semantic>=0.98, kl<=0.01, "
            "sr>=0.95, or a task's retention.",
        ),
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Candidates measured. [default: 200]")] = None,
    objective: Annotated[
        str, typer.Option(help="kl, top1, semantic, sr, srcr, or a task's retention.")
    ] = "kl",
    tasks: Annotated[str, typer.Option(help="Tasks of sr and srcr, comma-separated.")] = "bundled",
    limit: Annotated[int | None, typer.Option(help="Items a task. [default: all]")] = None,
    storage: Annotated[
        str | None,
        typer.Option(help="Database URL of the trials. [default: SQLite, removed at the end]"),
    ] = None,
    study: Annotated[
        str | None, typer.Option(help="The study's name there. [default: by the settings]")
    ] = None,
    sparsities: Sparsities = None,
    widths: Widths = None,
    group_size: GroupSize = None,
    symmetric: Symmetric = None,
    prune_method: PruneMethod = None,
    quant_method: QuantMethod = None,
    config: Config = None,
    calibration: Source = None,
    samples: Samples = None,
    seq_len: SeqLen = None,
    format_name: FormatName = None,
    database: Database = None,
    database_limit: DatabaseLimit = None,
    ray: Ray = None,
    memory: Memory = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    seed: Seed = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Find the best configuration at a size, measured, never worse than uniform."""
    from srcr import tables
    from srcr.compression import Output
    from srcr.options import Options
    from srcr.planning.budget import parse_target
    from srcr.planning.constraint import Objective, parse_constraint
    from srcr.planning.search import SearchSpec
    from srcr.planning.search import search as run
    from srcr.types import from_dict

    if (target is None) == (constraint is None):
        raise InputError("a search needs either --target tcr=0.8125 or --constraint semantic>=0.98")
    names = tuple(part.strip() for part in tasks.split(",") if part.strip())
    aim = Objective(objective, names, limit)
    wanted = parse_target(target) if target is not None else parse_constraint(str(constraint), aim)
    given: dict[str, Any] = {
        "sparsities": _numbers(sparsities, "sparsities", float),
        "widths": _numbers(widths, "widths", int), "group_size": group_size, "symmetric": symmetric,
        "prune_method": prune_method, "quant_method": quant_method, "calibration": calibration,
        "samples": samples, "seq_len": seq_len, "format": format_name, "seed": seed, "device": device,
        "memory": memory,
    }  # fmt: skip
    options = from_dict(Options, given, where="the command line").over(config)
    resources = _resources(database, database_limit, ray, options.memory)
    try:
        found = run(
            model,
            wanted,
            options.space(),
            options.data(),
            Output(out, options.format, overwrite, resume),
            SearchSpec(200 if trials is None else trials, storage, study, resources, aim),
            seed=options.seed or 0,
            device=options.device or "auto",
            command=_command(),
        )
    except KeyboardInterrupt as error:
        _fail(f"interrupted; {error or 'nothing was written'}", 1)
    if as_json:
        _print_json(found | {"out": str(out)})
    else:
        tables.search(found, out)


@app.command()
def evaluate(
    base: Annotated[str, typer.Argument(help="The original model.", show_default=False)],
    compressed: Annotated[
        list[str], typer.Argument(help="One or more compressed versions.", show_default=False)
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the JSON here.")] = None,
    text: Annotated[str, typer.Option(help="Text to compare on, as --calibration.")] = "self",
    samples: Annotated[int | None, typer.Option(help="Sequences. [default: 64]")] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens a sequence.")] = 512,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: bundled, paper (MMLU-Pro, BBH, MATH), lm-evaluation-harness names, "
            "folders of task files with a slash in the name."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Items a task. [default: all]")] = None,
    semantic: Annotated[
        bool, typer.Option("--semantic", help="Compare the meaning of continuations.")
    ] = False,
    prompts: Annotated[
        int | None, typer.Option(help="Prompts for --semantic. [default: 200]")
    ] = None,
    prompt_len: Annotated[
        int | None, typer.Option(help="Tokens a prompt for --semantic. [default: 32]")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(help="Tokens a continuation for --semantic. [default: 32]")
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option(
            help="Sentence-embedding model for --semantic: a name, a folder, or the base itself: base. "
            "[default: all-MiniLM-L6-v2 where the extra semantic is installed, else base]"
        ),
    ] = None,
    report: Annotated[
        bool,
        typer.Option(
            "--report",
            help="Also write evaluation.json, report.html and the model card's figures into each folder.",
        ),
    ] = False,
    overwrite: Overwrite = False,
    seed: Seed = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure what compressed models kept of the original, with 95 % intervals."""
    from srcr import tables
    from srcr.evaluation import EvaluationText, TaskSpec
    from srcr.evaluation import evaluate as run
    from srcr.metrics.semantic import SemanticSpec
    from srcr.results import check_results, write_results
    from srcr.types import from_dict

    if limit is not None and tasks is None:
        raise InputError(f"--limit {limit} is a number of items a task: name the --tasks too")
    check_results(out, compressed if report else [], overwrite)
    wanted = None
    if tasks is not None:
        wanted = TaskSpec(tuple(part.strip() for part in tasks.split(",") if part.strip()), limit)
    given = {"n": prompts, "prompt_len": prompt_len, "max_new_tokens": new_tokens, "scorer": scorer}
    given = {key: value for key, value in given.items() if value is not None}
    if given and not semantic:
        raise InputError(
            "--prompts, --prompt-len, --new-tokens and --scorer belong to --semantic: add it"
        )
    meaning = from_dict(SemanticSpec, given, where="the command line") if semantic else None
    reports = run(
        base,
        compressed,
        EvaluationText(text, samples, seq_len),
        wanted,
        meaning,
        seed or 0,
        device or "auto",
    )
    reports = [{**found, "command": _command()} for found in reports]
    write_results(reports, out, report)
    if as_json:
        _print_json(reports[0] if len(reports) == 1 else reports)
    else:
        tables.evaluation(reports)


@app.command()
def report(
    results: Annotated[
        list[Path],
        typer.Argument(help="Compressed folders, or JSON of 'srcr evaluate'.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file.")] = Path("report.html"),
    overwrite: Overwrite = False,
) -> None:
    """Build one self-contained HTML page: how much smaller, and what was kept."""
    from srcr.report import write_report

    write_report(results, out, overwrite)
    typer.echo(f"report: {out}")


@app.command()
def methods(as_json: Json = False) -> None:
    """List the pruning and quantization methods."""
    from srcr import tables
    from srcr.methods import pruners, quantizers

    rows = [
        {"kind": kind, "name": m.name, "compensates": m.compensates, "summary": m.summary,
         "paper": m.paper}
        for kind, found in (("prune", pruners()), ("quant", quantizers()))
        for m in found.values()
    ]  # fmt: skip
    if as_json:
        _print_json({"methods": rows})
    else:
        tables.methods(rows)


def _add_later(name: str, what: str) -> None:
    """A command of the design that has not been built: it says so, whatever it is given."""

    @app.command(
        name,
        help=f"{what} Not available yet.",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    def later() -> None:
        raise NotAvailableYetError(f"srcr {name}")


for _name, _what in {
    "recover": "Repair a compressed model by distillation.",
    "export": "Convert a compressed model to another format.",
}.items():
    _add_later(_name, _what)


#: Bytes that are worth a call of the system: twice what is worked on at a time (``hessian.PART``).
LARGE = 1 << 24
#: Free bytes that may stay at the end of the heap for what comes next, until a step gives them back.
NEXT = 1 << 28
#: Their numbers in glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def _fail(message: str, code: int) -> NoReturn:
    sys.stdout.flush()
    line = " ".join(part.strip() for part in message.splitlines())
    typer.echo(f"error: {line}", err=True)
    raise SystemExit(code)


def main() -> None:
    """Entry point: errors become one clear line and an exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' own bars; srcr shows its own
    try:
        app()
    except SrcrError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt as error:
        _fail(f"interrupted; {error or 'nothing was written'}", 1)
    except (OSError, MemoryError) as error:
        _fail(str(error) or type(error).__name__, 1)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which need not be imported here
            raise
        _fail(f"{error}; use fewer --samples, a shorter --seq-len, or --device cpu", 1)


def _tune_allocator() -> None:
    """From now on glibc gives back to the system what is larger than ``LARGE`` as soon as it is free. It
    would keep up to 32 MB a piece for later, among which what stays in use leaves holes: after some blocks of
    a large model, hundreds of megabytes. What is free at the end of the heap it keeps, up to ``NEXT``:
    activations come and go there, and the system would clear the same pages over and over."""
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_THRESHOLD, LARGE)
            libc.mallopt(M_TRIM_THRESHOLD, NEXT)


def process() -> None:
    """The command as a process of its own: :func:`main`, without the cost of garbage collection.

    Importing torch and transformers makes some hundred thousand objects that live to the end. Looking
    through them again and again takes seconds and frees nothing, and so does taking them apart at the exit.
    """
    gc.set_threshold(1_000_000, 50, 50)
    _tune_allocator()
    code = 1

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    atexit.register(leave)  # the first to be registered is the last to be called
    try:
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise
