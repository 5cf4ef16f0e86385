"""Arguments and options that several commands have: the name, type, flags and help of each, once, in the
groups that commands have them in. Defaults are those of the specifications that they fill in. What says how
weights are treated is in :class:`srcr.plans.settings.RecipeSettings`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typing_extensions import TypedDict

from srcr.cli.config import read_config
from srcr.cli.option import MEASURES, OUTPUT, RUN, TEXT, TRAINING, option
from srcr.data.specs import CALIBRATION_SAMPLES, Calibration, EvaluationText
from srcr.pipelines.options import RunOptions


def argument(metavar: str, text: str) -> Any:
    """An argument of a command."""
    return typer.Argument(metavar=metavar, help=text, show_default=False)


class Model(TypedDict):
    """The model that is worked on."""

    model: Annotated[str, argument("MODEL", "A folder, a hub id, or 'bundled'.")]


class Folder(TypedDict):
    """A result."""

    folder: Annotated[Path, argument("DIR", "A compressed model.")]


class Base(TypedDict):
    """What compressed models are held against."""

    base: Annotated[str, argument("BASE", "The original model.")]


class Out(TypedDict):
    """Where the result goes."""

    out: Annotated[Path, option(OUTPUT, "The folder to write.", "--out", "-o", metavar="OUT")]


class Json(TypedDict, total=False):
    """How the result is shown."""

    as_json: Annotated[bool, option(OUTPUT, "Print one JSON object on stdout.", "--json")]


class Overwrite(TypedDict, total=False):
    """What is done to what is there."""

    overwrite: Annotated[bool, option(OUTPUT, "Replace an earlier result.", "--overwrite")]


class Written(Json, Overwrite):
    """How a result is shown, and what is done to what is there."""


class Format(TypedDict, total=False):
    """How weights are stored."""

    format: Annotated[
        str,
        option(
            OUTPUT,
            "compressed-tensors, gptq, gguf, archive or dense.",
            "--format",
            default="compressed-tensors",
            metavar="NAME",
        ),
    ]


class Chat(TypedDict, total=False):
    """Whether text goes through the chat template."""

    chat: Annotated[
        bool,
        option(
            TEXT,
            "All text through the tokenizer's chat template, or none.",
            "--chat/--no-chat",
            default="chats, and half of what the model writes",
        ),
    ]


class Calibrating(Chat, total=False):
    """The text that compression measures on."""

    calibration: Annotated[
        str,
        option(
            TEXT,
            "bundled, self, a .txt, .jsonl, .parquet or .safetensors file, or "
            "hf:NAME[:CONFIG[:SPLIT[:COLUMN]]].",
            default=Calibration.source,
            metavar="SOURCE",
        ),
    ]
    samples: Annotated[
        int,
        option(
            TEXT,
            "Sequences.",
            default=f"{CALIBRATION_SAMPLES}, or all of a shorter text",
            metavar="N",
        ),
    ]
    seq_len: Annotated[
        int, option(TEXT, "Tokens a sequence.", default=Calibration.seq_len, metavar="N")
    ]


class TextLength(Chat, total=False):
    """The length of what a text is cut into."""

    seq_len: Annotated[
        int, option(TEXT, "Tokens a sequence.", default=EvaluationText.seq_len, metavar="N")
    ]


class Limit(TypedDict, total=False):
    """How much of tasks is measured."""

    limit: Annotated[int, option(MEASURES, "Items a task.", default="all", metavar="N")]


class Training(TypedDict, total=False):
    """Whether what is compressed is trained."""

    recover: Annotated[
        str,
        option(
            TRAINING,
            "Train the result against the original before it is written, so long: 10min, 1h, 500steps.",
            default="no",
            metavar="TIME",
        ),
    ]


class Running(TypedDict, total=False):
    """How a command runs."""

    config: Annotated[
        Path,
        option(
            RUN,
            "A YAML file with these options by name, such as a result's run.yaml.",
            metavar="FILE",
            callback=read_config,
        ),
    ]
    seed: Annotated[int, option(RUN, "Seed of everything random.", default=0, metavar="N")]
    device: Annotated[
        str,
        option(RUN, "auto, cpu, cuda or cuda:0.", default=RunOptions.device, metavar="NAME"),
    ]
    cache: Annotated[
        bool,
        option(
            TEXT,
            "Keep text that the model writes in the user's cache folder, and take it from there.",
            "--cache/--no-cache",
            default="cache",
        ),
    ]


class Memory(TypedDict, total=False):
    """What a run may take."""

    memory: Annotated[
        str,
        option(
            RUN, "Memory budget, as 4GB or 500MB.", default="half of what is free", metavar="SIZE"
        ),
    ]


class Requantize(TypedDict, total=False):
    """What may be compressed."""

    allow_requantize: Annotated[
        bool,
        option(
            RUN,
            "Compress a model that is compressed already, which loses more.",
            "--allow-requantize",
        ),
    ]


class Resume(TypedDict, total=False):
    """How a long run begins."""

    resume: Annotated[bool, option(RUN, "Continue a killed run of the same settings.", "--resume")]
    dry_run: Annotated[
        bool,
        option(
            RUN,
            "Only say what it would come to: sizes, memory, disk, time, group sizes, and what is refused.",
            "--dry-run",
        ),
    ]
