"""Options of the command that measures."""

from pathlib import Path
from typing import Annotated

from typing_extensions import TypedDict

from srcr.cli import parameters as given
from srcr.cli.option import MEASURES, OUTPUT, TEXT, option
from srcr.data.specs import EVALUATION_SAMPLES, EvaluationText
from srcr.metrics.specs import SemanticSpec


class Compressed(TypedDict):
    """What is measured."""

    compressed: Annotated[
        list[str], given.argument("COMPRESSED...", "One or more compressed versions.")
    ]


class Texts(TypedDict, total=False):
    """What it is measured on."""

    text: Annotated[
        str,
        option(
            TEXT,
            "Text to compare on, as --calibration of compress.",
            default=EvaluationText.source,
            metavar="SOURCE",
        ),
    ]
    samples: Annotated[
        int,
        option(
            TEXT,
            "Sequences.",
            "--samples",
            default=f"{EVALUATION_SAMPLES}, or all of a shorter text",
            metavar="N",
        ),
    ]


class Measures(given.Limit, total=False):
    """What is measured."""

    tasks: Annotated[
        str,
        option(
            MEASURES,
            "Comma-separated: bundled, paper (MMLU-Pro, BBH, MATH), lm-evaluation-harness names, "
            "folders of task files with a slash in the name.",
            metavar="NAMES",
        ),
    ]
    semantic: Annotated[
        bool, option(MEASURES, "Compare the meaning of continuations.", "--semantic")
    ]
    prompts: Annotated[
        int, option(MEASURES, "Prompts for --semantic.", default=SemanticSpec.n, metavar="N")
    ]
    prompt_len: Annotated[
        int,
        option(
            MEASURES,
            "Tokens a prompt for --semantic.",
            "--prompt-len",
            default=SemanticSpec.prompt_len,
            metavar="N",
        ),
    ]
    new_tokens: Annotated[
        int,
        option(
            MEASURES,
            "Tokens a continuation for --semantic.",
            default=SemanticSpec.max_new_tokens,
            metavar="N",
        ),
    ]
    scorer: Annotated[
        str,
        option(
            MEASURES,
            "Sentence-embedding model for --semantic: a name, a folder, or the base itself: base.",
            default="all-MiniLM-L6-v2 where the extra semantic is installed, else base",
            metavar="NAME",
        ),
    ]
    speed: Annotated[
        bool,
        option(
            MEASURES,
            "Time both models in turn: tokens a second of reading a prompt, and of writing.",
            "--speed",
        ),
    ]


class Results(given.Written, total=False):
    """What is written."""

    out: Annotated[Path, option(OUTPUT, "Write the JSON here.", "--out", "-o", metavar="FILE")]
    report: Annotated[
        bool,
        option(
            OUTPUT,
            "Also write evaluation.json, report.html and the model card's figures into each folder.",
            "--report",
        ),
    ]


class Evaluate(given.Base, Compressed, Results, Texts, given.TextLength, Measures, given.Running):
    """What the command is given."""
