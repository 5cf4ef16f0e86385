"""Parameters of the command that measures."""

from pathlib import Path
from typing import Annotated

import typer

from srcr.cli.option import (
    MEASURES,
    OUTPUT,
    TEXT,
    option,
)
from srcr.data.specs import (
    EVALUATION_SAMPLES,
    EvaluationText,
)
from srcr.metrics.specs import SemanticSpec

Compressed = Annotated[
    list[str],
    typer.Argument(
        metavar="COMPRESSED...", help="One or more compressed versions.", show_default=False
    ),
]
JsonFile = Annotated[
    Path | None, option(OUTPUT, "Write the JSON here.", "--out", "-o", metavar="FILE")
]
Text = Annotated[
    str | None,
    option(
        TEXT,
        "Text to compare on, as --calibration of compress.",
        default=EvaluationText.source,
        metavar="SOURCE",
    ),
]
TextSamples = Annotated[
    int | None,
    option(
        TEXT,
        "Sequences.",
        "--samples",
        default=f"{EVALUATION_SAMPLES}, or all of a shorter text",
        metavar="N",
    ),
]
Tasks = Annotated[
    str | None,
    option(
        MEASURES,
        "Comma-separated: bundled, paper (MMLU-Pro, BBH, MATH), lm-evaluation-harness names, "
        "folders of task files with a slash in the name.",
        metavar="NAMES",
    ),
]
Semantic = Annotated[bool, option(MEASURES, "Compare the meaning of continuations.", "--semantic")]
Prompts = Annotated[
    int | None, option(MEASURES, "Prompts for --semantic.", default=SemanticSpec.n, metavar="N")
]
PromptLength = Annotated[
    int | None,
    option(
        MEASURES,
        "Tokens a prompt for --semantic.",
        "--prompt-len",
        default=SemanticSpec.prompt_len,
        metavar="N",
    ),
]
NewTokens = Annotated[
    int | None,
    option(
        MEASURES,
        "Tokens a continuation for --semantic.",
        default=SemanticSpec.max_new_tokens,
        metavar="N",
    ),
]
Scorer = Annotated[
    str | None,
    option(
        MEASURES,
        "Sentence-embedding model for --semantic: a name, a folder, or the base itself: base.",
        default="all-MiniLM-L6-v2 where the extra semantic is installed, else base",
        metavar="NAME",
    ),
]
Speed = Annotated[
    bool,
    option(
        MEASURES,
        "Time both models in turn: tokens a second of reading a prompt, and of writing.",
        "--speed",
    ),
]
Report = Annotated[
    bool,
    option(
        OUTPUT,
        "Also write evaluation.json, report.html and the model card's figures into each folder.",
        "--report",
    ),
]
