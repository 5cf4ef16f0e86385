"""Options of the commands that choose a configuration."""

from pathlib import Path
from typing import Annotated

from typing_extensions import TypedDict

from srcr.cli import parameters as given
from srcr.cli.option import OUTPUT, SEARCH, listed, option
from srcr.planning.specs import BITS, SPARSITIES, ExplorationSpec, SearchSpec
from srcr.plans.objective import Objective
from srcr.plans.settings import LayerSettings, LevelSettings


class Levels(LevelSettings, LayerSettings, total=False):
    """What each layer may become."""

    sparsities: Annotated[
        str,
        option(
            SEARCH,
            "Sparsities that a layer may have, comma-separated.",
            default=listed(SPARSITIES),
            metavar="S,S",
        ),
    ]
    widths: Annotated[
        str,
        option(
            SEARCH,
            "Bits that a layer may have, comma-separated.",
            default=listed(BITS),
            metavar="B,B",
        ),
    ]


class Target(TypedDict, total=False):
    """The size that is wanted."""

    target: Annotated[str, option(SEARCH, "tcr=0.8125, stored=40MB or loaded=4GB.", metavar="SIZE")]


class Resources(given.Memory, total=False):
    """What the work may use."""

    database: Annotated[
        Path,
        option(
            SEARCH,
            "Folder of the level database, to keep it.",
            default="removed at the end",
            metavar="DIR",
        ),
    ]
    database_limit: Annotated[
        str,
        option(SEARCH, "The most that the level database may take, as 2GB.", metavar="SIZE"),
    ]
    ray: Annotated[
        str,
        option(
            SEARCH,
            "A Ray cluster that measures; 'local' starts one.",
            default="this process",
            metavar="ADDRESS",
        ),
    ]


class Probes(TypedDict, total=False):
    """How much is measured of each part."""

    probes: Annotated[
        int,
        option(
            SEARCH,
            "Levels at which the KL of the whole model is measured.",
            default=ExplorationSpec.probes,
            metavar="N",
        ),
    ]


class TableFile(TypedDict):
    """The file that is written."""

    out: Annotated[Path, option(OUTPUT, "The JSON table.", "--out", "-o", metavar="FILE")]


class PlanFiles(TypedDict, total=False):
    """The file that is written, and what it is made of."""

    out: Annotated[
        Path,
        option(
            OUTPUT,
            "The YAML plan, for 'srcr compress --plan'.",
            "--out",
            "-o",
            default="plan.yaml",
            metavar="FILE",
        ),
    ]
    table: Annotated[
        Path,
        option(SEARCH, "A table of 'srcr sensitivity'.", default="made now", metavar="FILE"),
    ]


class Aim(Target, total=False):
    """What a search looks for, and how."""

    constraint: Annotated[
        str,
        option(
            SEARCH,
            "Instead of a target, what the smallest model must keep: 'semantic>=0.98', 'kl<=0.01', "
            "'sr>=0.95', or a task's retention. Quote it: shells take > for a redirection.",
            metavar="TEXT",
        ),
    ]
    trials: Annotated[
        int,
        option(SEARCH, "Candidates measured.", default=SearchSpec.trials, metavar="N"),
    ]
    objective: Annotated[
        str,
        option(
            SEARCH,
            "kl, top1, semantic, sr, srcr, or a task's retention.",
            default=Objective.measure,
            metavar="NAME",
        ),
    ]
    tasks: Annotated[
        str,
        option(
            SEARCH,
            "Tasks of sr and srcr, comma-separated.",
            default=",".join(Objective.tasks_of_sr),
            metavar="NAMES",
        ),
    ]
    remove: Annotated[
        list[str],
        option(
            SEARCH,
            "Whole structures that are tried beside, as experts=0.25 or channels=0.2,heads=1; given "
            "several times, one finalist of each.",
            default="nothing",
            metavar="WHAT",
        ),
    ]
    storage: Annotated[
        str,
        option(
            SEARCH,
            "Database URL of the trials.",
            default="SQLite, removed at the end",
            metavar="URL",
        ),
    ]
    study: Annotated[
        str,
        option(SEARCH, "The study's name there.", default="by the settings", metavar="NAME"),
    ]


class Sensitivity(
    given.Model, TableFile, given.Written, Probes, Levels, Resources, given.Calibrating,
    given.Requantize, given.Running,
):  # fmt: skip
    """What 'srcr sensitivity' is given."""


class Plan(
    given.Model, PlanFiles, given.Written, given.Format, Target, Levels, Resources,
    given.Calibrating, given.Requantize, given.Running,
):  # fmt: skip
    """What 'srcr plan' is given."""


class Search(
    given.Model, given.Out, given.Written, given.Format, Aim, given.Limit, Levels, Resources,
    given.Calibrating, given.Training, given.Resume, given.Requantize, given.Running,
):  # fmt: skip
    """What 'srcr search' is given."""
