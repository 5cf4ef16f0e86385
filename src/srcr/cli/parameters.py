"""Parameters that several commands have: their flags and help texts, once."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="A folder, a hub id, or 'bundled'.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="The folder to write.", show_default=False)]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue a killed run of the same settings.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result.")]
Config = Annotated[Path | None, typer.Option(help="A YAML file with these options by name.")]

# Methods
Sparsity = Annotated[
    float | None, typer.Option(help="Fraction of weights that become zero, 0 to 1. [default: 0]")
]
Structure = Annotated[
    str | None,
    typer.Option(help="unstructured, or N:M (N of every M are kept). [default: unstructured]"),
]
Bits = Annotated[int | None, typer.Option(help="2 to 8; 16 quantizes nothing. [default: 4]")]
GroupSize = Annotated[
    str | None,
    typer.Option(
        help="Columns that share a scale: auto (128 where it divides, else -1), -1 (the whole row) or "
        "a number. [default: auto]"
    ),
]
Symmetric = Annotated[
    bool | None,
    typer.Option(
        "--symmetric/--asymmetric", help="Without or with zero-points. [default: symmetric]"
    ),
]
PruneMethod = Annotated[str | None, typer.Option(help="See 'srcr methods'. [default: sparsegpt]")]
QuantMethod = Annotated[str | None, typer.Option(help="See 'srcr methods'. [default: gptq]")]
Mode = Annotated[
    str | None, typer.Option(help="joint, sequential-a or sequential-b. [default: joint]")
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        help="Compress only layers that match: a glob ('*.mlp.*') or re: and a regular expression; may be "
        "given several times. [default: all]",
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(help="Leave layers alone that match, as --targets; may be given several times."),
]
Embeddings = Annotated[
    int | None,
    typer.Option(
        help="Bits of the input embedding and the output head, 4 to 8; 16 leaves them alone. [default: 16]"
    ),
]
Remove = Annotated[
    str | None,
    typer.Option(
        help="Whole structures that go before: channels, heads (key-value heads with their query heads) and "
        "layers, a share or a count each, as channels=0.25,heads=1,layers=2. [default: nothing]"
    ),
]
Plan = Annotated[Path | None, typer.Option(help="A plan for each layer, instead of one for all.")]

# Data, format, machine
Source = Annotated[
    str | None,
    typer.Option(
        help="bundled, self, a .txt, .jsonl, .parquet or .safetensors file, or "
        "hf:NAME[:CONFIG[:SPLIT[:COLUMN]]]. [default: self]"
    ),
]
Samples = Annotated[
    int | None, typer.Option(help="Sequences. [default: 128, or all of a shorter text]")
]
SeqLen = Annotated[int | None, typer.Option(help="Tokens a sequence. [default: 512]")]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="compressed-tensors, gptq, gguf, archive or dense. [default: compressed-tensors]",
    ),
]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random. [default: 0]")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda. [default: auto]")]
Memory = Annotated[
    str | None, typer.Option(help="Memory budget, as 4GB or 500MB. [default: half of what is free]")
]
Cache = Annotated[
    bool | None,
    typer.Option(
        "--cache/--no-cache",
        help="Keep text that the model writes in the user's cache folder, and take it from there. "
        "[default: cache]",
    ),
]

# Search
Sparsities = Annotated[
    str | None,
    typer.Option(
        help="Sparsities that a layer may have, comma-separated. [default: 0,0.1,0.2,0.25,0.3,0.4,0.5]"
    ),
]
Widths = Annotated[
    str | None,
    typer.Option(help="Bits that a layer may have, comma-separated. [default: 2,3,4,5,6,8]"),
]
TargetSize = Annotated[
    str | None, typer.Option(help="tcr=0.8125, stored=40MB or loaded=4GB.", show_default=False)
]
ConstraintText = Annotated[
    str | None,
    typer.Option(
        help="Instead of a target, what the smallest model must keep: semantic>=0.98, kl<=0.01, "
        "sr>=0.95, or a task's retention.",
    ),
]
Trials = Annotated[int | None, typer.Option(help="Candidates measured. [default: 200]")]
Measure = Annotated[str, typer.Option(help="kl, top1, semantic, sr, srcr, or a task's retention.")]
SearchTasks = Annotated[str, typer.Option(help="Tasks of sr and srcr, comma-separated.")]
Limit = Annotated[int | None, typer.Option(help="Items a task. [default: all]")]
Storage = Annotated[
    str | None,
    typer.Option(help="Database URL of the trials. [default: SQLite, removed at the end]"),
]
Study = Annotated[
    str | None, typer.Option(help="The study's name there. [default: by the settings]")
]
Database = Annotated[
    Path | None,
    typer.Option(help="Folder of the level database, to keep it. [default: removed at the end]"),
]
DatabaseLimit = Annotated[
    str | None, typer.Option(help="The most that the level database may take, as 2GB.")
]
Ray = Annotated[
    str | None,
    typer.Option(help="A Ray cluster that measures; 'local' starts one. [default: this process]"),
]
Probes = Annotated[
    int | None,
    typer.Option(help="Levels at which the KL of the whole model is measured. [default: 3]"),
]
SensitivityFile = Annotated[
    Path | None, typer.Option(help="A table of 'srcr sensitivity'. [default: made now]")
]

# Recovery
Recover = Annotated[
    str | None,
    typer.Option(
        help="Train the result against the original before it is written, so long: 10min, 1h, 500steps. "
        "[default: no]"
    ),
]
Minutes = Annotated[
    float | None, typer.Option(help="Minutes of training. [default: 10, or as --steps says]")
]
Steps = Annotated[int | None, typer.Option(help="Steps of training, instead of --minutes.")]
StageName = Annotated[
    str | None,
    typer.Option(
        "--stage",
        help="distill (end to end), blockwise (each block for itself), or both. [default: distill]",
    ),
]
BatchRows = Annotated[int | None, typer.Option("--batch", help="Sequences a step. [default: 8]")]
Train = Annotated[
    str | None,
    typer.Option(
        help="codes (what is behind them, scales, norms and biases), or scales (codes stay). [default: codes]"
    ),
]
Loss = Annotated[
    str | None,
    typer.Option(help="kl (to the original's predictions), or cakld (both ways). [default: kl]"),
]
LearningRate = Annotated[
    float | None,
    typer.Option(
        "--lr",
        help="Learning rate, in steps of the grid, for rows of 1024 inputs. [default: 0.001]",
    ),
]
Sources = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration",
        help="Text to train on, as of compress; given several times, an equal part of each. [default: self]",
    ),
]
RecoverySamples = Annotated[
    int | None, typer.Option("--samples", help="Sequences in all. [default: 512]")
]
ProcessCount = Annotated[
    int,
    typer.Option(
        "--processes",
        min=1,
        help="Processes that train together, one on each GPU; or see torchrun.",
    ),
]
HeldOut = Annotated[
    str,
    typer.Option(
        help="Text that the best state is chosen by, and measured on: better another source."
    ),
]

# Evaluation
Base = Annotated[str, typer.Argument(help="The original model.", show_default=False)]
Compressed = Annotated[
    list[str], typer.Argument(help="One or more compressed versions.", show_default=False)
]
JsonFile = Annotated[Path | None, typer.Option("--out", "-o", help="Write the JSON here.")]
Text = Annotated[str, typer.Option(help="Text to compare on, as --calibration.")]
TextSamples = Annotated[
    int | None, typer.Option(help="Sequences. [default: 64, or all of a shorter text]")
]
TextLength = Annotated[int, typer.Option(help="Tokens a sequence.")]
Tasks = Annotated[
    str | None,
    typer.Option(
        help="Comma-separated: bundled, paper (MMLU-Pro, BBH, MATH), lm-evaluation-harness names, "
        "folders of task files with a slash in the name."
    ),
]
Semantic = Annotated[bool, typer.Option("--semantic", help="Compare the meaning of continuations.")]
Prompts = Annotated[int | None, typer.Option(help="Prompts for --semantic. [default: 200]")]
PromptLength = Annotated[
    int | None, typer.Option(help="Tokens a prompt for --semantic. [default: 32]")
]
NewTokens = Annotated[
    int | None, typer.Option(help="Tokens a continuation for --semantic. [default: 32]")
]
Scorer = Annotated[
    str | None,
    typer.Option(
        help="Sentence-embedding model for --semantic: a name, a folder, or the base itself: base. "
        "[default: all-MiniLM-L6-v2 where the extra semantic is installed, else base]"
    ),
]
Speed = Annotated[
    bool,
    typer.Option(
        "--speed",
        help="Time both models in turn: tokens a second of reading a prompt, and of writing.",
    ),
]
Report = Annotated[
    bool,
    typer.Option(
        "--report",
        help="Also write evaluation.json, report.html and the model card's figures into each folder.",
    ),
]
