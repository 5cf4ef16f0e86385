"""The commands that choose a configuration: sensitivity, plan, search."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from srcr.cli import parameters as given
from srcr.cli import search_parameters as searching
from srcr.cli.app import Command, app, command_line, given_only, print_json, show_preview
from srcr.errors import InputError

if TYPE_CHECKING:
    from srcr.plans.structures import StructureSpec


@app.command(cls=Command)
def sensitivity(
    model: given.Model,
    out: searching.TableFile,
    probes: searching.Probes = None,
    sparsities: searching.Sparsities = None,
    widths: searching.Widths = None,
    group_size: given.GroupSize = None,
    symmetric: given.Symmetric = None,
    prune_method: given.PruneMethod = None,
    quant_method: given.QuantMethod = None,
    config: given.Config = None,
    calibration: given.Source = None,
    samples: given.Samples = None,
    seq_len: given.SeqLen = None,
    database: searching.Database = None,
    database_limit: searching.DatabaseLimit = None,
    ray: searching.Ray = None,
    memory: given.Memory = None,
    overwrite: given.Overwrite = False,
    allow_requantize: given.Requantize = None,
    seed: given.Seed = None,
    device: given.Device = None,
    cache: given.Cache = None,
    as_json: given.Json = False,
) -> None:
    """Measure what each part of a model loses at each sparsity and width."""
    arguments = locals()
    from srcr.cli import tables
    from srcr.cli.options import Options, resources
    from srcr.pipelines.sensitivity import sensitivity as run
    from srcr.planning.specs import ExplorationSpec
    from srcr.serialize import to_dict, to_json
    from srcr.storage.files import check_new_file, write_text

    check_new_file(out, overwrite)
    options = Options.of(arguments, config)
    table = run(
        model,
        options.space(),
        options.data(),
        ExplorationSpec.probes if probes is None else probes,
        resources(database, database_limit, ray),
        options.run(command_line()),
    )
    write_text(out, to_json(table))
    if as_json:
        print_json(to_dict(table))
    else:
        tables.sensitivity(table, out)


@app.command(cls=Command)
def plan(
    model: given.Model,
    target: searching.TargetSize = None,
    out: searching.PlanFile = Path("plan.yaml"),
    table: searching.SensitivityFile = None,
    sparsities: searching.Sparsities = None,
    widths: searching.Widths = None,
    group_size: given.GroupSize = None,
    symmetric: given.Symmetric = None,
    prune_method: given.PruneMethod = None,
    quant_method: given.QuantMethod = None,
    config: given.Config = None,
    calibration: given.Source = None,
    samples: given.Samples = None,
    seq_len: given.SeqLen = None,
    format: given.Format = None,
    database: searching.Database = None,
    database_limit: searching.DatabaseLimit = None,
    ray: searching.Ray = None,
    memory: given.Memory = None,
    overwrite: given.Overwrite = False,
    allow_requantize: given.Requantize = None,
    seed: given.Seed = None,
    device: given.Device = None,
    cache: given.Cache = None,
    as_json: given.Json = False,
) -> None:
    """Give each part of a model the sparsity and width it deserves, at a size."""
    arguments = locals()
    from srcr.cli import tables
    from srcr.cli.options import Options, resources
    from srcr.pipelines.plan import plan as run
    from srcr.planning.costs import parse_target
    from srcr.records.sensitivity import SensitivityTable
    from srcr.serialize import from_yaml, to_dict, to_yaml
    from srcr.storage.files import check_new_file, write_text

    size = parse_target(_named(target))
    check_new_file(out, overwrite)
    known = None if table is None else from_yaml(SensitivityTable, table)
    if known is not None:
        Options.of(arguments, None).check_table()
    options = Options.of(arguments, config)
    result = run(
        model,
        size,
        options.space() if known is None else known,
        options.data(),
        options.format or "compressed-tensors",
        resources(database, database_limit, ray),
        options.run(command_line()),
    )
    write_text(out, to_yaml(result))
    if as_json:
        print_json(to_dict(result))
    else:
        tables.plan(result, out)


def _named(target: str | None) -> str:
    """The target that was named.

    Raises:
        InputError: none was.
    """
    if target is None:
        raise InputError("a plan needs a size: --target tcr=0.8125, stored=40MB or loaded=4GB")
    return target


def _size(
    target: str | None,
    constraint: str | None,
    objective: str | None,
    tasks: str | None,
    limit: int | None,
) -> tuple[Any, Any]:
    """What a search looks for, and what its finalists are compared by.

    Raises:
        InputError: neither a target nor a constraint was given, or both.
    """
    from srcr.cli.options import split_names
    from srcr.planning.costs import parse_target
    from srcr.plans.objective import Objective, parse_constraint

    names = None if tasks is None else split_names(tasks)
    aim = Objective(**given_only({"measure": objective, "tasks_of_sr": names, "limit": limit}))
    if target is not None and constraint is None:
        return parse_target(target), aim
    if target is None and constraint is not None:
        return parse_constraint(constraint, aim), aim
    raise InputError("a search needs either --target tcr=0.8125 or --constraint 'semantic>=0.98'")


@app.command(cls=Command)
def search(
    model: given.Model,
    out: given.Out,
    target: searching.TargetSize = None,
    constraint: searching.ConstraintText = None,
    trials: searching.Trials = None,
    objective: searching.Measure = None,
    tasks: searching.SearchTasks = None,
    limit: given.Limit = None,
    storage: searching.Storage = None,
    study: searching.Study = None,
    sparsities: searching.Sparsities = None,
    widths: searching.Widths = None,
    removals: searching.Removals = None,
    group_size: given.GroupSize = None,
    symmetric: given.Symmetric = None,
    prune_method: given.PruneMethod = None,
    quant_method: given.QuantMethod = None,
    config: given.Config = None,
    calibration: given.Source = None,
    samples: given.Samples = None,
    seq_len: given.SeqLen = None,
    format: given.Format = None,
    database: searching.Database = None,
    database_limit: searching.DatabaseLimit = None,
    ray: searching.Ray = None,
    recover: given.Recover = None,
    memory: given.Memory = None,
    resume: given.Resume = False,
    overwrite: given.Overwrite = False,
    dry_run: given.DryRun = False,
    allow_requantize: given.Requantize = None,
    seed: given.Seed = None,
    device: given.Device = None,
    cache: given.Cache = None,
    as_json: given.Json = False,
) -> None:
    """Find the best configuration at a size, measured, never worse than uniform."""
    arguments = locals()
    from srcr.cli.options import Options, resources
    from srcr.pipelines.options import Output
    from srcr.pipelines.search import search as run
    from srcr.planning.specs import SearchSpec

    size, aim = _size(target, constraint, objective, tasks, limit)
    options = Options.of(arguments, config)
    spec = SearchSpec(
        SearchSpec.trials if trials is None else trials, storage, study,
        resources(database, database_limit, ray), aim, recovery=options.training(),
        structures=_structures(removals),
    )  # fmt: skip
    output, how = Output(out, options.format, overwrite, resume), options.run(command_line())
    wanted = (model, size, options.space(), options.data(), output, spec, how)
    if dry_run:
        from srcr.pipelines.preview import preview_search

        show_preview(preview_search(*wanted), as_json)
    else:
        _show(run(*wanted), out, as_json)


def _structures(removals: list[str] | None) -> "tuple[StructureSpec, ...]":
    """What is removed whole from a finalist each."""
    from srcr.plans.structures import parse_structures

    return tuple(parse_structures(each) for each in removals or ())


def _show(result: Any, out: Path, as_json: bool) -> None:
    """Show what a search has chosen."""
    from srcr.cli import tables
    from srcr.serialize import to_dict

    if as_json:
        print_json(to_dict(result) | {"out": str(out)})
    else:
        tables.search(result, out)
