"""The page as text: what it says, what it leaves out, and that nothing in it can run or call out."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from srcr.errors import InputError
from srcr.plans.recovery import RecoverySpec
from srcr.records.estimate import Estimate
from srcr.records.evaluation import Speed, Throughput
from srcr.records.recovery import RecoveryRecord, TrainingPoint
from srcr.records.run import StructureRecord
from srcr.records.text import TextRecord
from srcr.report import build_report, load_runs, write_report
from srcr.report.html import evaluate_command, headline, word_diff
from srcr.report.plots import mode
from srcr.report.runs import Run, load_searches
from srcr.report.searches import search_history
from srcr.report.table import columns, smaller, summary

MakeRuns = Callable[..., list[Path]]


class Page(HTMLParser):
    """What a browser would see: the text outside of scripts and styles, tags and their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text = ""
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._inside: list[str] = []
        self.feed(page)
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.text += data


@pytest.fixture(scope="module")
def runs(dozen: list[Path]) -> list[Run]:
    return load_runs(dozen)


@pytest.fixture(scope="module")
def page(runs: list[Run]) -> str:
    return build_report(runs)


def test_the_first_words_say_what_was_compressed_and_what_it_kept(
    runs: list[Run], page: str
) -> None:
    text = Page(page).text
    chosen = headline(runs)
    best = runs[chosen.index]
    assert best.evaluation
    assert best.evaluation.srcr == max(run.evaluation.srcr or 0 for run in runs if run.evaluation)
    start = text[: text.index("Every compressed model")]
    assert "models/tiny-llama" in start
    assert re.search(
        r"\d\.\d\s× smaller on disk, \d\.\d\s× smaller in memory, keeps \d+\.\d\s%", start
    )
    assert f"{best.name}, best SrCr of 12 runs" in start
    assert "it is not bytes" in start


def test_every_section_is_there(page: str) -> None:
    parsed = Page(page)
    ids = {attrs.get("id") for _, attrs in parsed.tags}
    assert {"runs", "tradeoff", "map", "layers", "tasks", "semantic", "divergence", "record"} <= ids
    for words in (
        "srcr compress models/tiny-llama",
        "McNemar",
        "abab",
        "912",
        "transformers",
        "chance",
    ):
        assert words in parsed.text
    assert "fills this" not in parsed.text, "nothing is missing in these runs"


def test_what_was_not_measured_is_one_line_that_says_how(runs: list[Run]) -> None:
    run = runs[3]
    assert run.evaluation
    bare = replace(run.evaluation, tasks={}, semantic=None, sr=None, srcr=None)
    text = Page(build_report([replace(run, evaluation=bare)])).text
    folder = Path(run.folder).name  # the page may be passed on
    command = f"srcr evaluate models/tiny-llama {folder} "
    assert command + "--tasks arc_easy,hellaswag --report --overwrite fills this" in text
    assert command + "--semantic --report --overwrite fills this" in text
    assert "top-1 agreement" in text[: text.index("95 % intervals stand beside")]
    bundled = replace(run, evaluation=replace(bare, base="bundled"))
    assert f"bundled {folder} --tasks bundled --report" in Page(build_report([bundled])).text
    only_made = Page(build_report([replace(run, evaluation=None)])).text
    assert "what it kept has not been measured" in only_made
    assert f"srcr evaluate models/tiny-llama {folder} --report fills this" in only_made
    only_measured = Page(build_report([replace(run, record=None, plan=None)])).text
    assert "give the folder that srcr compress wrote" in only_measured


def test_one_run_is_shown_as_one(runs: list[Run]) -> None:
    page = Page(build_report(runs[3:4]))
    ids = {attrs.get("id") for _, attrs in page.tags}
    assert not ids & {"filters", "table", "tradeoff", "map"}
    assert {"values", "plot-histogram", "plot-layers", "plot-tasks"} <= ids
    shown = page.text[page.text.index("95 % intervals stand beside") :]
    order = [
        shown.index(word)
        for word in ("Mean KL(", "Same top-1", "SrSemantic", "Weight files", "Mode")
    ]
    assert order == sorted(order)
    assert "Pareto" not in page.text


def test_what_a_run_kept_stands_beside_its_name_and_the_base_is_a_row(
    runs: list[Run], page: str
) -> None:
    heads = re.findall(r'aria-sort="none"[^>]*><button type="button">([^<]*)', page)
    assert heads[:4] == ["Run", "KL", "Same top-1", "Sr"]
    foot = page[page.index("<tfoot>") : page.index("</tfoot>")]
    assert "tiny-llama" in foot
    assert "4.44 MB" in foot
    assert f">{summary(runs[headline(runs).index])}</output>" in page
    assert summary(runs[0]).startswith("KL 0.")
    without = [replace(run, evaluation=None) for run in runs]
    heads = [column.title for column in columns(without)]
    assert "KL" not in heads
    assert "Stored" in heads


def test_speed_is_shown_where_it_was_measured(runs: list[Run], page: str) -> None:
    run = runs[0]
    assert run.evaluation
    assert "Tokens a second" not in Page(page).text
    faster = Throughput(1200.0, 1500.0, Estimate(1.25, (1.2, 1.3)))
    speed = Speed(faster, faster, 256, 32, 10, "cpu", 2, "float32")
    measured = replace(run, evaluation=replace(run.evaluation, speed=speed))
    text = Page(build_report([measured, runs[1]])).text
    assert "1,2001,5001.25 ×[1.2, 1.3]" in text
    assert "cpu, 2 threads, float32" in text


def test_a_searchs_candidates_are_drawn(searched: Path, tmp_path: Path) -> None:
    write_report([searched], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    text = Page(page).text
    assert "5 candidates were measured" in text
    assert "4 of them with every part compressed" in text
    assert "1 of those were given up early" in text
    for plot in ("history", "predicted", "front"):
        assert f'id="plot-search-1-{plot}"' in page


def test_the_headline_falls_back(runs: list[Run]) -> None:
    without = [
        replace(run, evaluation=replace(run.evaluation, srcr=None, sr=None))
        for run in runs
        if run.evaluation
    ]
    chosen = headline(without)
    values = [
        run.evaluation.divergence.kl.value
        for run in without
        if run.evaluation and run.evaluation.divergence
    ]
    assert chosen.why.startswith("smallest KL")
    assert chosen.index == values.index(min(values))
    assert headline([replace(run, evaluation=None) for run in runs]).why.startswith(
        "smallest on disk"
    )


NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{7*7}}<!--"


def test_untrusted_text_stays_text(runs: list[Run], page: str, searched: Path) -> None:
    run = runs[0]
    assert run.record
    assert run.evaluation
    assert run.evaluation.semantic
    pair = replace(
        run.evaluation.semantic.worst[0], prompt=NASTY, base=NASTY, compressed="b " + NASTY
    )
    evaluation = replace(
        run.evaluation,
        base=NASTY,
        command=NASTY,
        tasks={NASTY: next(iter(run.evaluation.tasks.values()))},
        semantic=replace(run.evaluation.semantic, worst=(pair,), scorer=NASTY),
    )
    layer = replace(run.record.layers[0], name=NASTY)
    history = replace(search_history(NASTY, load_searches([searched])[0][1]), chosen=NASTY)
    record = replace(run.record, command=NASTY, notes=(NASTY,), layers=(layer,), base=NASTY)
    hostile = replace(run, name=NASTY, record=record, evaluation=evaluation)
    clean = Page(page)
    for nasty in (
        build_report([hostile], searches=[history]),
        build_report([hostile, run], searches=[history, history]),
    ):
        read = Page(nasty)
        scripts = [tag for tag, _ in read.tags if tag == "script"]
        assert len(scripts) == len([tag for tag, _ in clean.tags if tag == "script"]) == 3
        assert not [tag for tag, attrs in read.tags if tag == "img" or "onerror" in attrs]
        assert "{{7*7}}" in read.text


def test_the_data_are_json(page: str) -> None:
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert text
    data = json.loads(text[1], parse_constant=pytest.fail)
    assert len(data["tasks"]) == len(data["layers"]["columns"]) == 12


def test_nothing_is_fetched_and_the_policy_forbids_it(page: str) -> None:
    for tag, attrs in Page(page).tags:
        assert not attrs.keys() & {"src", "srcset", "action", "data", "poster"}, tag
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert (attrs.get("href") or "#").startswith("#")
    policy = next(attrs["content"] for tag, attrs in Page(page).tags if "http-equiv" in attrs)
    assert policy
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy


def test_three_dozen_runs_of_a_large_model_fit_in_two_megabytes(
    tmp_path: Path, make_runs: MakeRuns, page: str
) -> None:
    assert len(page.encode()) < 1_500_000
    large = load_runs(make_runs(tmp_path, 3, blocks=32))
    many = [replace(large[i % 3], name=f"run-{i}") for i in range(36)]
    assert len(build_report(many).encode()) <= 2_000_000


def test_the_same_runs_give_the_same_bytes(runs: list[Run], page: str) -> None:
    assert build_report(runs) == page


def test_words_that_differ_are_marked() -> None:
    left, right = word_diff("the old mill, then", "the new mill then")
    assert left == [("the ", False), ("old", True), (" mill", False), (",", True), (" then", False)]
    assert right == [("the ", False), ("new", True), (" mill", False), (" then", False)]
    assert word_diff("", "a") == ([], [("a", True)])


def test_a_larger_model_is_not_called_smaller() -> None:
    assert smaller(100, 50).endswith("× smaller")
    assert smaller(50, 100).endswith("× larger")
    assert smaller(100, 101) == "the same size"


def test_the_file_appears_whole_or_not_at_all(tmp_path: Path, dozen: list[Path]) -> None:
    out = tmp_path / "new" / "report.html"
    write_report(dozen[:2], out)
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]
    with pytest.raises(InputError, match="--overwrite"):
        write_report(dozen[:2], out)
    write_report(dozen[:1], out, overwrite=True)
    with pytest.raises(InputError, match="is a folder"):
        write_report(dozen[:1], tmp_path)
    with pytest.raises(InputError, match="is a file, not a folder"):
        write_report(dozen[:1], out / "deeper.html")
    with pytest.raises(InputError, match="does not exist"):
        write_report([tmp_path / "absent"], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()
    with pytest.raises(InputError, match="no run"):
        build_report([])


@pytest.mark.slow
def test_a_hundred_runs_keep_the_details_of_the_best(dozen: list[Path], searched: Path) -> None:
    runs = load_runs(dozen)
    ((name, search),) = load_searches([searched])
    history = search_history(name, replace(search, measured=search.measured * 40))
    many = [replace(run, name=f"{run.name}-{i}") for i in range(9) for run in runs]
    page = build_report(many, searches=[history] * 8)
    assert len(page.encode()) <= 2_000_000
    assert "6 of 8 searches are drawn" in Page(page).text
    assert "details are here for the best" in page
    assert all(f">{run.name}<" in page for run in many)  # every run is in the table
    assert "details are here for the best" not in build_report(runs)


def test_semantic_consistency_may_be_undefined(runs: list[Run]) -> None:
    run = next(run for run in runs if run.evaluation and run.evaluation.semantic)
    alike = replace(run.evaluation.semantic, normalised=None, normalised_ci95=None)
    page = build_report([replace(run, evaluation=replace(run.evaluation, semantic=alike))])
    assert "Semantic consistency" in page


def test_one_half_alone_is_not_called_joint(runs: list[Run]) -> None:
    modes = {run.name: mode(run) for run in runs}
    assert modes["w3"] == "quantization only"
    assert modes["s50-dense"] == "pruning only"
    assert modes["s25-w4"] == "joint"
    assert modes["s25-w4-case-a"] == "sequential-a"


def test_the_command_measures_again_what_was_there(runs: list[Run]) -> None:
    run = next(run for run in runs if run.evaluation and run.evaluation.tasks)
    command = evaluate_command(run, "--semantic")
    assert "--tasks" in command
    assert command.endswith("--report --overwrite")
    bare = replace(run, evaluation=None, folder="runs/w4")
    assert evaluate_command(bare, "--tasks bundled").endswith("runs/w4 --tasks bundled --report")


def test_training_and_what_was_removed_are_shown(runs: list[Run]) -> None:
    text = TextRecord("wiki <b>", 2, 8, "ff", tokens=16)
    recovery = RecoveryRecord(
        RecoverySpec(steps=4), "small", text, text, 4, 4, 64, 60.0,
        Estimate(0.4, (0.3, 0.5)), Estimate(0.2, (0.1, 0.3)), Estimate(-0.2, (-0.25, -0.15)), True,
        (TrainingPoint(0, None, 0.4, 0.1), TrainingPoint(2, 0.5, 0.3, 0.1), TrainingPoint(4, 0.3, 0.2, 0.1)),
    )  # fmt: skip
    structures = (StructureRecord("channels", 128, 96, errors=(0.1,)),)
    (run,) = (run for run in runs[:1] if run.record)
    record = replace(run.record, recoveries=(recovery,), structures=structures)
    page = build_report([replace(run, record=record)])
    assert 'points="0.0,10.0 300.0,45.0 600.0,80.0"' in page
    assert "KL 0.4 to 0.2 on held-out text; 4 steps, 64 tokens, 1.0 minutes." in page
    assert "[-0.25, -0.15]" in page
    assert "wiki &lt;b&gt;" in page
    assert "96 of 128 left" in page
    refused = replace(recovery, accepted=False, stopped="the loss of step 3 is not finite")
    page = build_report([replace(run, record=replace(record, recoveries=(recovery, refused)))])
    assert "no gain on held-out text" in page
    assert "Training 2 of 2" in page
    assert "Stopped: the loss of step 3 is not finite." in page
