"""What the terminal shows at 80 and 120 columns, as it was looked at: ``SRCR_SNAPSHOTS=write`` writes the
snapshots anew."""

import io
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console

from srcr import cli
from srcr.cli import tables
from srcr.pipelines import progress
from srcr.pipelines.inspect import inspect
from srcr.pipelines.shortened import shorten
from srcr.plans.specs import PruneSpec, QuantSpec
from srcr.records.estimate import Estimate
from srcr.records.evaluation import Divergence, Evaluation, KlEstimate, Perplexity, TaskScore
from srcr.records.preview import Preview
from srcr.records.run import LayerRecord, Rates, RunRecord
from srcr.records.sensitivity import GroupLosses, LevelLoss, SensitivityTable
from srcr.records.text import TextRecord
from srcr.testing import tiny_model

SNAPSHOTS = Path(__file__).parent / "snapshots"
BASE = "/models/of/a/person/with/many/folders/SmolLM2-135M-Instruct"
RATES = Rates(0.25, 4, 0.8125, 0.2612, 269_060_552, 110_231_040, 109_930_112, "vllm", "srcr.json")
TEXT = TextRecord("wiki.txt", 64, 512, "0" * 64)
LAYERS = tuple(
    LayerRecord(f"model.layers.{n}.self_attn.{x}_proj", (576, 576), 0.25, 4, 0.8125, 0.26, 2.9, 0.1**n)
    for n in range(3)
    for x in "qo"
)  # fmt: skip
RECORD = RunRecord(
    BASE, "0" * 64, "srcr compress", "compressed-tensors", RATES, "0" * 16, TEXT, LAYERS, {}, 1234.5, 1 << 30
)  # fmt: skip
PREVIEW = Preview(
    "compress", BASE, "compressed-tensors", 269_060_552, 110_231_040, 109_930_112, 1 << 30, 20 << 30,
    210_000_000, 60 << 30, "self: at most 128 x 512 tokens", 0.8125, 0.25, 4.0, {"64": 180, "128": 30},
    ("group size auto: of 210 layers 128 for 30, 64 for 180",), 97.3,
)  # fmt: skip


def evaluation(name):
    divergence = Divergence(
        KlEstimate(0.1942, (0.1838, 0.2051)), Estimate(0.801, (0.795, 0.807)), Perplexity(33.9, 38.8), 32_768
    )  # fmt: skip
    task = TaskScore(0.61, 0.58, 0.25, 400, 0.917, (0.8, 1.02))
    return Evaluation(
        BASE, name, RATES, None, divergence, None, {"knowledge": task, "logic": task}, 0.925,
        (0.807, 1.019), 0.868, (0.79, 0.94), text=TEXT,
    )  # fmt: skip


SENSITIVITY = SensitivityTable(
    BASE, "0" * 64, TEXT, tuple(
        GroupLosses(
            tuple(f"model.layers.{n}.self_attn.{x}_proj" for x in names), 576 * 576 * len(names),
            tuple(LevelLoss(s, 4, 1e-3 * (1 + s), 0.002) for s in (0.0, 0.25, 0.5)),
        )
        for n in (0, 11)
        for names in ("qkv", "o")
    ), PruneSpec(), QuantSpec(),
)  # fmt: skip
EVALUATIONS = [evaluation(f"/results/{name}") for name in ("joint", "only-4-bits")]
SHOWN = {
    "inspect": lambda: tables.inspection(inspect(tiny_model("llama"))),
    "compress": lambda: tables.compression(RECORD, Path("/results/of/a/person/joint")),
    "dry-run": lambda: tables.preview(PREVIEW),
    "evaluate": lambda: tables.evaluation(EVALUATIONS),
    "sensitivity": lambda: tables.sensitivity(SENSITIVITY, Path("table.json")),
}


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", [*SHOWN, "methods", "help", "compress-help"])
def test_tables_look_as_they_did(name, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERMINAL_WIDTH", str(columns))
    if name in SHOWN:
        SHOWN[name]()
    else:
        options = {"methods": ["methods"], "help": ["-h"], "compress-help": ["compress", "-h"]}
        monkeypatch.setattr(sys, "argv", ["srcr", *options[name]])
        with suppress(SystemExit):
            cli.main()
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    text = re.sub(r"Usage: .*?srcr\b", "Usage: srcr", "\n".join(lines)) + "\n"
    assert max(map(len, lines)) <= columns
    path = SNAPSHOTS / f"{name}-{columns}.txt"
    if os.environ.get("SRCR_SNAPSHOTS") == "write":
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [2, 3, 12, 19, 20, 40])
def test_names_keep_both_ends(width):
    name = "model.layers.11.q_proj"
    short = shorten(name, width)
    assert len(short) == min(width, len(name))
    assert (name[-1] == short[-1]) or width < 2
    assert short == name or "…" in short


def terminal(columns):
    """A console of so many columns that takes itself for a terminal, and what it has written."""
    stream = io.StringIO()
    return Console(file=stream, force_terminal=True, width=columns, highlight=False), stream


@pytest.mark.parametrize("columns", [80, 120])
def test_a_bar_keeps_percent_and_time_beside_a_long_path(columns, monkeypatch):
    shown, stream = terminal(columns)
    monkeypatch.setattr(progress, "console", lambda: shown)
    with progress.stage("calibrate", 4) as bar:
        bar.note("/a/very/long/path/" + "folder/" * 20 + "end.txt", advance=2)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).replace("\r", "\n").split("\n")
    last = [line for line in lines if line.startswith("calibrate")][-1]
    assert len(last) <= columns
    assert re.search(r"50 % +\d:\d\d:\d\d left .*GB /a/.*….*end\.txt", last)


def test_a_log_file_gets_a_line_now_and_then(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.stage("compress", 1000) as bar:
        for _ in range(1000):
            now[0] += 3.6
            bar.note("block", advance=1)
    lines = capsys.readouterr().err.splitlines()
    assert 10 < len(lines) < 60  # an hour
    assert re.match(r"compress +\d+ %  0:\d\d:\d\d  left 0:\d\d:\d\d  .* GB  block", lines[5])
    assert lines[-1].startswith("compress   100 %  1:00:00")


def test_quiet_says_nothing_and_other_bars_stay_away(capsys):
    from tqdm import tqdm

    with progress.stage("load", 2, quiet=True) as bar:
        bar.note("half", advance=1)
        list(tqdm(range(3), disable=False))
    assert capsys.readouterr().err == ""
    list(tqdm(range(3), disable=False))
    assert "3/3" in capsys.readouterr().err


def test_help_lists_what_there_is(capsys, monkeypatch):
    from srcr.engines import engines
    from srcr.formats import formats

    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    for command, names in (("compress", formats()), ("export", formats()), ("verify", engines())):
        monkeypatch.setattr(sys, "argv", ["srcr", command, "-h"])
        with suppress(SystemExit):
            cli.main()
        shown = capsys.readouterr().out
        assert all(name in shown for name in names)
