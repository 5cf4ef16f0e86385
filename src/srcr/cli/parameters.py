"""Parameters that several commands have: their flags and help texts, once. Defaults are those of the
specifications that they fill in."""

from pathlib import Path
from typing import Annotated, Any

import typer

from srcr.cli.option import (
    LAYERS,
    MEASURES,
    OUTPUT,
    RUN,
    TEXT,
    TRAINING,
    WEIGHTS,
    option,
)
from srcr.data.specs import (
    CALIBRATION_SAMPLES,
    Calibration,
    EvaluationText,
)
from srcr.numerics.sparsity import UNSTRUCTURED
from srcr.pipelines.options import RunOptions
from srcr.plans.specs import MODES, PruneSpec, QuantSpec, SolverSpec


def _folder(text: str) -> Any:
    return typer.Argument(metavar="DIR", help=text, show_default=False)


Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A folder, a hub id, or 'bundled'.", show_default=False),
]
ModelOrConfig = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A folder, a hub id, or 'bundled'; it may stand in --config.",
        show_default=False,
    ),
]
Folder = Annotated[Path, _folder("A compressed model.")]

Base = Annotated[
    str, typer.Argument(metavar="BASE", help="The original model.", show_default=False)
]
Candidate = Annotated[
    str,
    typer.Argument(metavar="COMPRESSED", help="The compressed version.", show_default=False),
]

# Output
Out = Annotated[Path, option(OUTPUT, "The folder to write.", "--out", "-o", metavar="OUT")]
OutOrConfig = Annotated[
    Path | None,
    option(OUTPUT, "The folder to write; it may stand in --config.", "--out", "-o", metavar="OUT"),
]
Overwrite = Annotated[bool, option(OUTPUT, "Replace an earlier result.", "--overwrite")]
Json = Annotated[bool, option(OUTPUT, "Print one JSON object on stdout.", "--json")]
Resume = Annotated[bool, option(RUN, "Continue a killed run of the same settings.", "--resume")]
Config = Annotated[
    Path | None,
    option(
        RUN, "A YAML file with these options by name, such as a result's run.yaml.", metavar="FILE"
    ),
]
Format = Annotated[
    str | None,
    option(
        OUTPUT,
        "compressed-tensors, gptq, gguf, archive or dense.",
        "--format",
        default="compressed-tensors",
        metavar="NAME",
    ),
]
ExportFormat = Annotated[
    str,
    option(
        OUTPUT,
        "The format to convert to: archive, compressed-tensors, dense, gguf or gptq.",
        "--format",
        metavar="NAME",
    ),
]
Requantize = Annotated[
    bool | None,
    option(
        RUN, "Compress a model that is compressed already, which loses more.", "--allow-requantize"
    ),
]

# Weights
Sparsity = Annotated[
    float | None,
    option(WEIGHTS, "Share of the weights that become zero, 0 to 1.", default=0, metavar="S"),
]
Structure = Annotated[
    str | None,
    option(
        WEIGHTS,
        "unstructured, or N:M (N of every M are kept).",
        default=UNSTRUCTURED,
        metavar="N:M",
    ),
]
Bits = Annotated[
    int | None,
    option(WEIGHTS, "2 to 8; 16 quantizes nothing.", default=QuantSpec.num_bits, metavar="B"),
]
GroupSize = Annotated[
    str | None,
    option(
        WEIGHTS,
        "Columns that share a scale: auto (128, 64 or 32, the first that divides, else -1), -1 (the whole "
        "row) or a number.",
        default=QuantSpec.group_size,
        metavar="N",
    ),
]
Symmetric = Annotated[
    bool | None,
    option(
        WEIGHTS, "Without or with zero-points.", "--symmetric/--asymmetric", default="symmetric"
    ),
]
PruneMethod = Annotated[
    str | None,
    option(WEIGHTS, "See 'srcr methods'.", default=PruneSpec.method, metavar="NAME"),
]
QuantMethod = Annotated[
    str | None,
    option(WEIGHTS, "See 'srcr methods'.", default=QuantSpec.method, metavar="NAME"),
]
Mode = Annotated[
    str | None,
    option(
        WEIGHTS,
        "One pass, or the paper's sequences.",
        default=SolverSpec.mode,
        choices=("mode", *MODES),
    ),
]
Embeddings = Annotated[
    int | None,
    option(
        WEIGHTS,
        "Bits of the input embedding and the output head, 4 to 8; 16 leaves them alone.",
        default=16,
        metavar="B",
    ),
]
Remove = Annotated[
    str | None,
    option(
        WEIGHTS,
        "Whole structures that go before: channels, heads (key-value heads with their query heads), layers "
        "and experts, a share or a count each, as channels=0.25,heads=1,layers=2.",
        default="nothing",
        metavar="WHAT",
    ),
]
Plan = Annotated[
    Path | None, option(WEIGHTS, "A plan for each layer, instead of one for all.", metavar="FILE")
]
Targets = Annotated[
    list[str] | None,
    option(
        LAYERS,
        "Compress only layers that match: a glob ('*.mlp.*') or re: and a regular expression; may be "
        "given several times.",
        default="all",
        metavar="PATTERN",
    ),
]
Ignore = Annotated[
    list[str] | None,
    option(
        LAYERS,
        "Leave layers alone that match, as --targets; may be given several times.",
        metavar="PATTERN",
    ),
]

# Text
Source = Annotated[
    str | None,
    option(
        TEXT,
        "bundled, self, a .txt, .jsonl, .parquet or .safetensors file, or "
        "hf:NAME[:CONFIG[:SPLIT[:COLUMN]]].",
        default=Calibration.source,
        metavar="SOURCE",
    ),
]
Samples = Annotated[
    int | None,
    option(
        TEXT, "Sequences.", default=f"{CALIBRATION_SAMPLES}, or all of a shorter text", metavar="N"
    ),
]
SeqLen = Annotated[
    int | None, option(TEXT, "Tokens a sequence.", default=Calibration.seq_len, metavar="N")
]
TextLength = Annotated[
    int | None,
    option(TEXT, "Tokens a sequence.", "--seq-len", default=EvaluationText.seq_len, metavar="N"),
]
Cache = Annotated[
    bool | None,
    option(
        TEXT,
        "Keep text that the model writes in the user's cache folder, and take it from there.",
        "--cache/--no-cache",
        default="cache",
    ),
]

# Run
Limit = Annotated[int | None, option(MEASURES, "Items a task.", default="all", metavar="N")]
Recover = Annotated[
    str | None,
    option(
        TRAINING,
        "Train the result against the original before it is written, so long: 10min, 1h, 500steps.",
        default="no",
        metavar="TIME",
    ),
]
Seed = Annotated[int | None, option(RUN, "Seed of everything random.", default=0, metavar="N")]
Device = Annotated[
    str | None, option(RUN, "auto, cpu, cuda or cuda:0.", default=RunOptions.device, metavar="NAME")
]
Memory = Annotated[
    str | None,
    option(RUN, "Memory budget, as 4GB or 500MB.", default="half of what is free", metavar="SIZE"),
]
DryRun = Annotated[
    bool,
    option(
        RUN,
        "Only say what it would come to: sizes, memory, disk, group sizes, and what is refused.",
        "--dry-run",
    ),
]
