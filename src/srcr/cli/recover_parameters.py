"""Parameters of the command that trains."""

from typing import Annotated, get_args

import typer

from srcr.cli.option import RUN, TEXT, TRAINING, option
from srcr.data.specs import (
    RECOVERY_SAMPLES,
    RecoveryText,
)
from srcr.plans import recovery

Minutes = Annotated[
    float | None,
    option(
        TRAINING,
        "Minutes of training.",
        default=f"{recovery.TEN_MINUTES.minutes:g}, or as --steps says",
        metavar="N",
    ),
]
Steps = Annotated[
    int | None, option(TRAINING, "Steps of training, instead of --minutes.", metavar="N")
]
StageName = Annotated[
    str | None,
    option(
        TRAINING,
        "End to end, each block for itself, or both.",
        "--stage",
        default=recovery.RecoverySpec.stage,
        choices=("stage", *get_args(recovery.Stage)),
    ),
]
BatchRows = Annotated[
    int | None,
    option(
        TRAINING,
        "Sequences a step.",
        "--batch",
        default=recovery.RecoverySpec.batch,
        metavar="N",
    ),
]
Train = Annotated[
    str | None,
    option(
        TRAINING,
        "codes (what is behind them, scales, norms and biases), or scales (codes stay).",
        default=recovery.RecoverySpec.train,
        choices=("train", *get_args(recovery.Trained)),
    ),
]
Loss = Annotated[
    str | None,
    option(
        TRAINING,
        "kl (to the original's predictions), or cakld (both ways).",
        default=recovery.RecoverySpec.loss,
        choices=("loss", *get_args(recovery.LossName)),
    ),
]
LearningRate = Annotated[
    float | None,
    option(
        TRAINING,
        "Learning rate, in steps of the grid, for rows of 1024 inputs.",
        "--lr",
        default=f"{recovery.RecoverySpec.lr:g}",
        metavar="RATE",
    ),
]
Sources = Annotated[
    list[str] | None,
    option(
        TEXT,
        "Text to train on, as of compress; given several times, an equal part of each.",
        "--calibration",
        default=",".join(RecoveryText.sources),
        metavar="SOURCE",
    ),
]
RecoverySamples = Annotated[
    int | None,
    option(TEXT, "Sequences in all.", "--samples", default=RECOVERY_SAMPLES, metavar="N"),
]
ProcessCount = Annotated[
    int,
    typer.Option(
        "--processes",
        min=1,
        help="Processes that train together, one on each GPU; or see torchrun.",
        rich_help_panel=RUN,
        metavar="N",
    ),
]
HeldOut = Annotated[
    str | None,
    option(
        TEXT,
        "Text that the best state is chosen by, and measured on: better another source.",
        default=RecoveryText.held_out,
        metavar="SOURCE",
    ),
]
