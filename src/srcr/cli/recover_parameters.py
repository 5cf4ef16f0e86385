"""Options of the command that trains."""

from typing import Annotated, get_args

import typer
from typing_extensions import TypedDict

from srcr.cli import parameters as given
from srcr.cli.option import RUN, TEXT, TRAINING, option
from srcr.data.specs import RECOVERY_SAMPLES, RecoveryText
from srcr.plans.recovery import TEN_MINUTES, LossName, RecoverySpec, Stage, Trained


class Spec(TypedDict, total=False):
    """How is trained: fields of a RecoverySpec."""

    stage: Annotated[
        str,
        option(
            TRAINING,
            "End to end, each block for itself, or both.",
            default=RecoverySpec.stage,
            choices=("stage", *get_args(Stage)),
        ),
    ]
    minutes: Annotated[
        float,
        option(
            TRAINING,
            "Minutes of training.",
            default=f"{TEN_MINUTES.minutes:g}, or as --steps says",
            metavar="N",
        ),
    ]
    steps: Annotated[int, option(TRAINING, "Steps of training, instead of --minutes.", metavar="N")]
    batch: Annotated[
        int,
        option(TRAINING, "Sequences a step.", default=RecoverySpec.batch, metavar="N"),
    ]
    train: Annotated[
        str,
        option(
            TRAINING,
            "codes (what is behind them, scales, norms and biases), or scales (codes stay).",
            default=RecoverySpec.train,
            choices=("train", *get_args(Trained)),
        ),
    ]
    loss: Annotated[
        str,
        option(
            TRAINING,
            "kl (to the original's predictions), or cakld (both ways).",
            default=RecoverySpec.loss,
            choices=("loss", *get_args(LossName)),
        ),
    ]
    lr: Annotated[
        float,
        option(
            TRAINING,
            "Learning rate, in steps of the grid, for rows of 1024 inputs.",
            default=f"{RecoverySpec.lr:g}",
            metavar="RATE",
        ),
    ]


class Texts(TypedDict, total=False):
    """What is trained on."""

    calibration: Annotated[
        list[str],
        option(
            TEXT,
            "Text to train on, as of compress; given several times, an equal part of each.",
            default=",".join(RecoveryText.sources),
            metavar="SOURCE",
        ),
    ]
    samples: Annotated[
        int,
        option(TEXT, "Sequences in all.", default=RECOVERY_SAMPLES, metavar="N"),
    ]
    held_out: Annotated[
        str,
        option(
            TEXT,
            "Text that the best state is chosen by, and measured on: better another source.",
            default=RecoveryText.held_out,
            metavar="SOURCE",
        ),
    ]


class Together(TypedDict, total=False):
    """Who trains."""

    processes: Annotated[
        int,
        typer.Option(
            "--processes",
            min=1,
            help="Processes that train together, one on each GPU; or see torchrun. [default: 1]",
            rich_help_panel=RUN,
            metavar="N",
            show_default=False,
        ),
    ]


class Compressed(TypedDict):
    """What is trained."""

    compressed: Annotated[str, given.argument("COMPRESSED", "The compressed version.")]


class Recover(
    given.Base, Compressed, given.Out, given.Written, Spec, Texts, given.TextLength, Together,
    given.Memory, given.Resume, given.Running,
):  # fmt: skip
    """What the command is given."""
