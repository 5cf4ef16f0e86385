"""srcr sensitivity, plan and search, from the command line to a checkpoint that loads."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from srcr.data.tokens import Tokens
from srcr.environment import parse_size
from srcr.testing import save_tiny_model

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("SRCR_KILLS", "1"))

LEVELS = ("--sparsities", "0,0.2,0.4", "--widths", "3,4,5")
#: As short as a search can be: little is found, but everything is written.
SHORT = ("--trials", 1, "--sparsities", 0, "--widths", "3,4")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("search") / "base", "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "ids.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file({"input_ids": torch.randint(0, 96, (40, 24), generator=generator)}, path)
    return path


def row_hashes(ids):
    return Tokens.of(ids).row_hashes()


def test_a_search_finds_writes_and_proves(srcr, base, text, tmp_path):
    out = tmp_path / "out"
    result = srcr(
        "search",
        base,
        "--target",
        "tcr=0.8",
        "-o",
        out,
        "--calibration",
        text,
        "--trials",
        16,
        *LEVELS,
        "--json",
    )
    assert result.code == 0, result.err
    data = result.json()
    assert data["out"] == str(out)
    assert data["trials"] == 16
    finalists = {finalist["compressed"]: finalist for finalist in data["finalists"]}
    chosen = finalists[data["chosen"]]
    # One that prunes and quantizes everywhere, what was allocated at once, and the best of what was measured.
    assert list(finalists) == ["uniform 20.02 % + 4 bits", "allocated", "searched"]
    on_choice = {name: score["kl"]["value"] for name, score in data["choice"].items()}
    assert on_choice.keys() == finalists.keys()
    assert on_choice[data["chosen"]] == min(on_choice.values())
    for finalist in finalists.values():
        assert 0.8 <= finalist["rates"]["tcr"] <= 0.8 * 1.005
    record = json.loads((out / "srcr.json").read_text())
    assert record["rates"]["tcr"] == chosen["rates"]["tcr"]
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "config.json", "evaluation.json", "generation_config.json", "model.safetensors",
        "plan.yaml", "run.yaml", "search.json", "srcr.json",
    ]  # fmt: skip
    assert not (tmp_path / "out.partial").exists()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
    # The four texts share no sequence: 16 of the file's 40 calibrate, then 8 each search, choose, measure.
    rows = row_hashes(load_file(text)["input_ids"])
    assert record["calibration"]["rows"] == rows[:16]
    assert len(set(rows)) == 40
    for name, part in (("text", slice(16, 24)), ("calibration", slice(0, 16))):
        ids = load_file(text)["input_ids"][part]
        assert data["sensitivity"][name]["sha256"] == Tokens.of(ids).sha256
    assert chosen["text"]["sha256"] == Tokens.of(load_file(text)["input_ids"][32:]).sha256
    assert json.loads((out / "evaluation.json").read_text())["text"] == chosen["text"]
    card = (out / "README.md").read_text()
    assert "Not measured yet" not in card
    assert f"{chosen['divergence']['kl']['value']:.4g}" in card
    page = tmp_path / "report.html"
    assert srcr("report", out, "-o", page).code == 0
    html = page.read_text()
    assert "What each part loses" in html
    assert all(name in html for name in finalists if name != data["chosen"])


def test_one_file_is_a_search(srcr, base, text, tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    result = srcr(
        "search", base, "-o", first, "--calibration", text, "--target", "tcr=0.8", *SHORT, "--json"
    )
    assert result.code == 0, result.err
    run = yaml.safe_load((first / "run.yaml").read_text())
    assert (run["target"], run["trials"], run["widths"], run["group_size"]) == (
        "tcr=0.8", 1, "3,4", "auto"
    )  # fmt: skip
    assert "out" not in run
    config = tmp_path / "moved.yaml"
    places = {"model": str(base), "calibration": str(text), "out": str(again)}
    config.write_text(yaml.safe_dump(run | places))
    second = srcr("search", "--config", config, "--json")
    assert second.code == 0, second.err
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    assert second.json()["chosen"] == result.json()["chosen"]
    assert (again / "run.yaml").read_bytes() == (first / "run.yaml").read_bytes()


def test_resume_on_a_finished_search(srcr, base, text, tmp_path):
    out = tmp_path / "out"
    command = ["search", base, "-o", out, "--calibration", text, *SHORT]
    first = srcr(*command, "--target", "tcr=0.8", "--json")
    assert first.code == 0, first.err
    again = srcr(*command, "--target", "tcr=0.8", "--resume", "--json")
    assert again.code == 0
    assert "already done" in again.err
    assert again.json() == first.json()
    other = srcr(*command, "--target", "tcr=0.79", "--resume")
    assert other.code == 2
    assert "is finished, with another target" in other.error()
    assert "--overwrite" in other.error()
    replaced = srcr(*command, "--target", "tcr=0.79", "--resume", "--overwrite", "--json")
    assert replaced.code == 0
    assert replaced.json()["target"] == {"tcr": 0.79}


def test_a_killed_search_goes_on_to_the_same_end(srcr, base, text, tmp_path):
    """Killed at any moment between its first trial and its end."""

    def command(out, *more):
        return [
            "search", base, "--target", "tcr=0.8", "-o", out, "--calibration", text, "--trials", 10,
            "--sparsities", "0,0.2", "--widths", "3,4", *more,
        ]  # fmt: skip

    began = time.monotonic()
    assert srcr(*command(tmp_path / "whole")).code == 0
    took = time.monotonic() - began
    rng = random.Random(os.getpid())
    for kill in range(KILLS):
        out, study = tmp_path / f"killed{kill}", tmp_path / f"killed{kill}.partial/study.db"
        process = subprocess.Popen(
            [sys.executable, "-m", "srcr", *map(str, command(out))],
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        while process.poll() is None and not study.exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.9) * took)
        process.send_signal(signal.SIGKILL)
        process.wait()
        resumed = srcr(*command(out, "--resume"))
        assert resumed.code == 0, resumed.err
        whole, resumed = (
            json.loads((folder / "search.json").read_text()) for folder in (tmp_path / "whole", out)
        )
        assert resumed["chosen"] == whole["chosen"]
        assert resumed["measured"] == whole["measured"]
        left, right = (load_file(f / "model.safetensors") for f in (tmp_path / "whole", out))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_sensitivity_then_plan_then_compress(srcr, base, text, tmp_path):
    table, plan, out = tmp_path / "table.json", tmp_path / "plan.yaml", tmp_path / "out"
    data = ("--calibration", text)
    levels = ("--sparsities", "0,0.25", "--widths", "3,4,5")
    result = srcr("sensitivity", base, "-o", table, *data, *levels, "--probes", 2)
    assert result.code == 0, result.err
    assert "group of model.layers" in result.out
    result = srcr("plan", base, "--target", "stored=4kB", "-o", plan, "--table", table)
    assert result.code == 2, "a target out of reach"
    assert "cannot be met" in result.error()
    assert not plan.exists()
    result = srcr("plan", base, "--target", "tcr=0.79", "-o", plan, "--table", table, "--json")
    assert result.code == 0, result.err
    assert result.json()["target"] == {"tcr": 0.79}
    result = srcr("compress", base, "-o", out, "--plan", plan, *data, "--json")
    assert result.code == 0, result.err
    assert 0.79 <= result.json()["rates"]["tcr"] <= 0.79 * 1.005
    assert srcr("report", out, table, "-o", tmp_path / "r.html").code == 0
    assert "What each part loses" in (tmp_path / "r.html").read_text()


def test_some_layers_stay_and_embeddings_are_rounded(srcr, base, text, tmp_path):
    asked = ("--ignore", "*.layers.0.*", "--embeddings", 8, "--group-size", 8)
    data = ("--calibration", text, "--sparsities", "0,0.4", "--widths", "3,4")
    table, plan, out = tmp_path / "table.json", tmp_path / "plan.yaml", tmp_path / "out"
    made = srcr("sensitivity", base, "-o", table, "--probes", 1, *asked, *data, "--json")
    assert made.code == 0, made.err
    names = [name for group in made.json()["groups"] for name in group["names"]]
    assert names
    assert all(".layers.1." in name for name in names)
    planned = srcr("plan", base, "--target", "tcr=0.39", "-o", plan, "--table", table, "--json")
    assert planned.code == 0, planned.err
    direct = srcr("plan", base, "--target", "tcr=0.39", "-o", tmp_path / "b.yaml", *asked, *data)
    assert direct.code == 0, direct.err
    searched = srcr(
        "search", base, "--target", "tcr=0.39", "-o", out, "--trials", 4, *asked, *data, "--json"
    )
    assert searched.code == 0, searched.err
    record = json.loads((out / "srcr.json").read_text())
    assert 0.39 <= record["rates"]["tcr"] <= 0.39 * 1.005
    for layers in (
        yaml.safe_load(plan.read_text()),
        yaml.safe_load((out / "plan.yaml").read_text()),
    ):
        left = [each["name"] for each in layers["layers"] if each.keys() == {"name"}]
        assert left == [each["name"] for each in layers["layers"] if ".layers.0." in each["name"]]
        assert {each["quant"]["num_bits"] for each in layers["embeddings"]} == {8}
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
    for name, tensor in before.items():
        if ".layers.0." in name:
            assert torch.equal(after[name], tensor)


def test_what_is_removed_beside_layers_that_stay_meets_the_target(srcr, base, text, tmp_path):
    asked = ("--ignore", "*.0.mlp.down_proj", "--remove", "channels=0.34", "--group-size", -1)
    data = ("--calibration", text, "--sparsities", "0,0.2,0.4", "--widths", "2,3,4,5")
    places = ("--target", "tcr=0.75", "-o", tmp_path / "out", "--trials", 1)
    assert srcr("search", base, *places, *asked, *data).code == 0
    found = json.loads((tmp_path / "out/search.json").read_text())
    rates = {each["compressed"]: each["rates"]["tcr"] for each in found["finalists"]}
    assert any("channels" in name for name in rates)
    for rate in rates.values():
        assert 0.75 <= rate <= 0.75 * 1.005


def test_the_smallest_that_keeps_enough(srcr, base, text, tmp_path):
    def command(constraint, out, *more):
        return (
            "search", base, "--constraint", constraint, "-o", out, "--calibration", text,
            "--trials", 4, *more,
        )  # fmt: skip

    levels = ("--sparsities", "0,0.2", "--widths", "4,5")
    result = srcr(*command("kl<=0.05", tmp_path / "out", *levels, "--json"))
    assert result.code == 0, result.err
    data = result.json()
    assert data["choice"][data["chosen"]]["value"] <= 0.05
    assert data["finalists"][0]["rates"]["tcr"] > 0.6
    near = ("--sparsities", "0,0.03", "--widths", "5")  # a few steps apart
    tight = srcr(*command("kl<=1e-9", tmp_path / "no", *near))
    assert tight.code == 1
    assert "no plan meets kl<=1e-09" in tight.error()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "needs either --target"),
        (["--target", "tcr=0.8", "--constraint", "kl<=1"], "needs either --target"),
        (["--target", "tcr=1.5"], "tcr=1.5"),
        (["--target", "tcr=0.99"], "cannot be met"),
        (["--target", "stored=1GB"], "cannot be met"),
        (["--target", "speed=4"], "use tcr=0.8125"),
        (["--constraint", "kl>=1"], "use <="),
        (["--constraint", "semantic"], "semantic>=0.98"),
        (["--target", "tcr=0.8", "--widths", "1,2"], "level"),
        (["--target", "tcr=0.8", "--widths", "a"], "numbers separated by commas"),
        (["--target", "tcr=0.8", "--trials", "0"], "trials 0"),
        (["--target", "tcr=0.8", "--tasks", "bundled"], "--tasks bundled are those of sr and srcr"),
        (["--constraint", "kl<=1", "--limit", "5"], "--limit 5 is a number of items a task"),
        (["--constraint", "kl<=1", "--ignore", "*.k_prj"], "matches no layer"),
        (["--target", "tcr=0.8", "--storage", "nonsense"], "storage nonsense"),
        (["--target", "tcr=0.8", "--database-limit", "1KB"], "--database-limit"),
        (["--target", "tcr=0.8", "--ray", "no.such.host:1"], "--ray no.such.host:1"),
    ],
)
def test_bad_input_is_refused(args, message, srcr, base, text, tmp_path):
    result = srcr("search", base, "-o", tmp_path / "out", "--calibration", text, *args)
    assert result.code == 2, result.err
    assert message in result.error()
    assert list(tmp_path.iterdir()) == []


def test_a_search_keeps_to_its_memory(tmp_path):
    """The smallest budget that is named is enough, and what the process really takes is within it."""
    base = save_tiny_model(
        tmp_path / "base", "llama", hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        head_dim=64, vocab_size=16384,
    )  # fmt: skip
    ids = torch.randint(0, 16384, (40, 64), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    command = [
        sys.executable, "-m", "srcr", "search", str(base), "--target", "tcr=0.8", "-o",
        str(tmp_path / "out"), "--calibration", str(tmp_path / "ids.safetensors"), "--trials", "4",
        "--sparsities", "0,0.25", "--widths", "4", "--memory",
    ]  # fmt: skip
    refused = subprocess.run([*command, "100MB"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "--memory 100MB is too little for this search" in refused.stderr
    smallest = refused.stderr.partition("use at least ")[2].split()[0]
    assert not (tmp_path / "out").exists()
    process = subprocess.Popen(
        [*command, smallest], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    assert usage.ru_maxrss * 1024 <= parse_size(smallest)
