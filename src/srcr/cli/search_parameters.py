"""Parameters of the commands that choose a configuration."""

from pathlib import Path
from typing import Annotated

from srcr.cli.option import (
    OUTPUT,
    SEARCH,
    listed,
    option,
)
from srcr.planning.specs import BITS, SPARSITIES, ExplorationSpec, SearchSpec
from srcr.plans.objective import Objective

Sparsities = Annotated[
    str | None,
    option(
        SEARCH,
        "Sparsities that a layer may have, comma-separated.",
        default=listed(SPARSITIES),
        metavar="S,S",
    ),
]
Widths = Annotated[
    str | None,
    option(
        SEARCH,
        "Bits that a layer may have, comma-separated.",
        default=listed(BITS),
        metavar="B,B",
    ),
]
Removals = Annotated[
    list[str] | None,
    option(
        SEARCH,
        "Whole structures that are tried beside, as experts=0.25 or channels=0.2,heads=1; given several "
        "times, one finalist of each.",
        "--remove",
        default="nothing",
        metavar="WHAT",
    ),
]
TargetSize = Annotated[
    str | None,
    option(SEARCH, "tcr=0.8125, stored=40MB or loaded=4GB.", "--target", metavar="SIZE"),
]
ConstraintText = Annotated[
    str | None,
    option(
        SEARCH,
        "Instead of a target, what the smallest model must keep: 'semantic>=0.98', 'kl<=0.01', "
        "'sr>=0.95', or a task's retention. Quote it: shells take > for a redirection.",
        "--constraint",
        metavar="TEXT",
    ),
]
Trials = Annotated[
    int | None, option(SEARCH, "Candidates measured.", default=SearchSpec.trials, metavar="N")
]
Measure = Annotated[
    str | None,
    option(
        SEARCH,
        "kl, top1, semantic, sr, srcr, or a task's retention.",
        "--objective",
        default=Objective.measure,
        metavar="NAME",
    ),
]
SearchTasks = Annotated[
    str | None,
    option(
        SEARCH,
        "Tasks of sr and srcr, comma-separated.",
        "--tasks",
        default=",".join(Objective.tasks_of_sr),
        metavar="NAMES",
    ),
]
Storage = Annotated[
    str | None,
    option(
        SEARCH,
        "Database URL of the trials.",
        default="SQLite, removed at the end",
        metavar="URL",
    ),
]
Study = Annotated[
    str | None,
    option(SEARCH, "The study's name there.", default="by the settings", metavar="NAME"),
]
Database = Annotated[
    Path | None,
    option(
        SEARCH,
        "Folder of the level database, to keep it.",
        default="removed at the end",
        metavar="DIR",
    ),
]
DatabaseLimit = Annotated[
    str | None,
    option(SEARCH, "The most that the level database may take, as 2GB.", metavar="SIZE"),
]
Ray = Annotated[
    str | None,
    option(
        SEARCH,
        "A Ray cluster that measures; 'local' starts one.",
        default="this process",
        metavar="ADDRESS",
    ),
]
Probes = Annotated[
    int | None,
    option(
        SEARCH,
        "Levels at which the KL of the whole model is measured.",
        default=ExplorationSpec.probes,
        metavar="N",
    ),
]
SensitivityFile = Annotated[
    Path | None,
    option(SEARCH, "A table of 'srcr sensitivity'.", "--table", default="made now", metavar="FILE"),
]
TableFile = Annotated[Path, option(OUTPUT, "The JSON table.", "--out", "-o", metavar="FILE")]
PlanFile = Annotated[
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
