"""The commands that choose a configuration: sensitivity, plan, search."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Unpack

from srcr.cli.app import command, print_json, show_preview
from srcr.cli.search_parameters import Plan, Search, Sensitivity
from srcr.errors import InputError

if TYPE_CHECKING:
    from srcr.planning.specs import SearchSpec


@command
def sensitivity(**options: Unpack[Sensitivity]) -> None:
    """Measure what each part of a model loses at each sparsity and width."""
    from srcr.cli import options as read
    from srcr.cli import tables
    from srcr.pipelines.sensitivity import sensitivity as run
    from srcr.planning.specs import ExplorationSpec
    from srcr.serialize import to_dict, to_json
    from srcr.storage.files import check_new_file, write_text

    out = options["out"]
    check_new_file(out, options.get("overwrite", False))
    table = run(
        options["model"],
        read.space_of(options),
        read.calibration_of(options),
        options.get("probes", ExplorationSpec.probes),
        read.resources_of(options),
        read.run_of(options),
    )
    write_text(out, to_json(table))
    if options.get("as_json"):
        print_json(to_dict(table))
    else:
        tables.sensitivity(table, out)


@command
def plan(**options: Unpack[Plan]) -> None:
    """Give each part of a model the sparsity and width it deserves, at a size."""
    from srcr.cli import options as read
    from srcr.cli import tables
    from srcr.pipelines.plan import plan as run
    from srcr.planning.costs import parse_target
    from srcr.records.sensitivity import SensitivityTable
    from srcr.serialize import from_yaml, to_dict, to_yaml
    from srcr.storage.files import check_new_file, write_text

    if "target" not in options:
        raise InputError("a plan needs a size: --target tcr=0.8125, stored=40MB or loaded=4GB")
    size = parse_target(options["target"])
    out = options.get("out", Path("plan.yaml"))
    check_new_file(out, options.get("overwrite", False))
    table = options.get("table")
    known = None if table is None else from_yaml(SensitivityTable, table)
    if known is not None:
        read.check_table(options)
    result = run(
        options["model"],
        size,
        read.space_of(options) if known is None else known,
        read.calibration_of(options),
        options.get("format", "compressed-tensors"),
        read.resources_of(options),
        read.run_of(options),
    )
    write_text(out, to_yaml(result))
    if options.get("as_json"):
        print_json(to_dict(result))
    else:
        tables.plan(result, out)


@command
def search(**options: Unpack[Search]) -> None:
    """Find the best configuration at a size, measured, never worse than uniform."""
    from srcr.cli import options as read
    from srcr.cli import tables
    from srcr.pipelines.search import search as run
    from srcr.serialize import to_dict

    size, spec = _wanted(options)
    given = (
        options["model"], size, read.space_of(options), read.calibration_of(options),
        read.output_of(options), spec, read.run_of(options),
    )  # fmt: skip
    if options.get("dry_run"):
        from srcr.pipelines.preview import preview_search

        show_preview(preview_search(*given), options.get("as_json"))
        return
    result = run(*given)
    read.write_run("search", options, read.level_defaults(options) | read.text_defaults(options))
    if options.get("as_json"):
        print_json(to_dict(result) | {"out": str(options["out"])})
    else:
        tables.search(result, options["out"])


def _wanted(options: Search) -> "tuple[Any, SearchSpec]":
    """What a search looks for, and how it goes.

    Raises:
        InputError: neither a target nor a constraint was given, or both; tasks or items that nothing asks.
    """
    from srcr.cli import options as read
    from srcr.planning.costs import parse_target
    from srcr.planning.specs import SearchSpec
    from srcr.plans.objective import MEANS, Objective, parse_constraint
    from srcr.plans.structures import parse_structures

    measured = read.picked(options, "limit", measure="objective")
    if "tasks" in options:
        measured["tasks_of_sr"] = read.split_names(options["tasks"])
    aim = Objective(**measured)
    if ("target" in options) == ("constraint" in options):
        raise InputError(
            "a search needs either --target tcr=0.8125 or --constraint 'semantic>=0.98'"
        )
    spec = SearchSpec(
        **read.picked(options, "trials", "storage", "study"),
        resources=read.resources_of(options),
        objective=aim,
        recovery=read.training_of(options),
        structures=tuple(parse_structures(each) for each in options.get("remove", ())),
    )
    wanted = None
    if "constraint" in options:
        wanted = parse_constraint(options["constraint"], aim)
        aim = wanted.objective
    if "tasks" in options and aim.measure not in MEANS:
        raise InputError(
            f"--tasks {options['tasks']} are those of sr and srcr, and this is by {aim.measure}: leave "
            "--tasks out, or use --objective sr"
        )
    if "limit" in options and not aim.tasks:
        raise InputError(
            f"--limit {options['limit']} is a number of items a task, and {aim.measure} asks none: leave it "
            "out, or use --objective sr"
        )
    return wanted or parse_target(options["target"]), spec
