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
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from srcr.planning.levels import Level
from srcr.testing import save_tiny_model

SMALL = ("--trials", 40, "--sparsities", "0,0.2,0.4", "--widths", "3,4,5")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("search") / "base", "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "ids.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file({"input_ids": torch.randint(0, 96, (40, 24), generator=generator)}, path)
    return path


def kl_of(found):
    return {one["compressed"]: one["divergence"]["kl"]["value"] for one in found["finalists"]}


def test_a_search_finds_writes_and_proves(srcr, base, text, tmp_path):
    out = tmp_path / "out"
    result = srcr(
        "search", base, "--target", "tcr=0.8", "-o", out, "--calibration", text, *SMALL, "--json"
    )
    assert result.code == 0, result.err
    found = result.json()
    assert found["out"] == str(out)
    assert found["trials"] >= 40
    chosen = next(one for one in found["finalists"] if one["compressed"] == found["chosen"])
    uniform = [name for name in kl_of(found) if name.startswith("uniform")]
    assert {"uniform 20 % + 4 bits", "allocated"} <= kl_of(found).keys() or uniform
    on_choice = {name: one["kl"]["value"] for name, one in found["choice"].items()}
    assert on_choice[found["chosen"]] == min(on_choice.values())
    for one in found["finalists"]:
        assert 0.8 <= one["rates"]["tcr"] <= 0.8 * 1.005
    record = json.loads((out / "srcr.json").read_text())
    assert record["rates"]["tcr"] == chosen["rates"]["tcr"]
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "config.json", "evaluation.json", "generation_config.json", "model.safetensors",
        "plan.yaml", "search.json", "srcr.json",
    ]  # fmt: skip
    assert not (tmp_path / "out.partial").exists()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
    # The four texts share no sequence, and what was measured on is the last.
    rows = record["calibration"]["rows"]
    assert chosen["text"]["sha256"] not in (record["calibration"]["sha256"], None)
    assert len(rows) == 16
    again = srcr(
        "search", base, "--target", "tcr=0.8", "-o", out, "--calibration", text, *SMALL, "--resume"
    )
    assert again.code == 0
    assert "already done" in again.err
    page = tmp_path / "report.html"
    assert srcr("report", out, "-o", page).code == 0
    html = page.read_text()
    assert "What each part loses" in html
    assert all(name in html for name in kl_of(found) if name != found["chosen"])


def test_a_killed_search_goes_on_to_the_same_end(base, text, tmp_path):
    def command(out, *more):
        return [
            sys.executable, "-m", "srcr", "search", str(base), "--target", "tcr=0.8", "-o", str(out),
            "--calibration", str(text), *map(str, SMALL), *more,
        ]  # fmt: skip

    began = time.monotonic()
    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    took = time.monotonic() - began
    rng = random.Random(os.getpid())
    for kill in range(2):
        out = tmp_path / f"killed{kill}"
        process = subprocess.Popen(
            command(out), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        time.sleep(rng.uniform(0.4, 0.95) * took)
        process.send_signal(signal.SIGKILL)
        process.wait()
        subprocess.run(command(out, "--resume"), check=True, capture_output=True)
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
    assert "what units lose" in result.out
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


def test_the_smallest_that_keeps_enough(srcr, base, text, tmp_path):
    out = tmp_path / "out"
    result = srcr(
        "search",
        base,
        "--constraint",
        "kl<=0.05",
        "-o",
        out,
        "--calibration",
        text,
        "--trials",
        24,
        "--json",
    )
    assert result.code == 0, result.err
    found = result.json()
    assert found["choice"][found["chosen"]]["value"] <= 0.05
    assert found["finalists"][0]["rates"]["tcr"] > 0.6
    tight = srcr(
        "search", base, "--constraint", "kl<=1e-9", "-o", tmp_path / "no", "--calibration", text,
        "--trials", 16,
    )  # fmt: skip
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


def test_a_ray_worker_that_is_killed_loses_its_trial_not_the_search(base, text, tmp_path):
    pytest.importorskip("ray")
    from srcr import Calibration, QuantSpec, Space, Treatment
    from srcr.planning.field import NONE, fill_database, open_field
    from srcr.planning.workers import Alone, connected, crew

    space = Space(
        (Level(0, 3), Level(0.2, 4), Level(0, 5)), Treatment(quant=QuantSpec(group_size=-1))
    )
    field = open_field(base, Calibration(str(text)), 0, "cpu", quiet=True)
    database = fill_database(field, space, NONE, tmp_path / "levels", None, quiet=True)
    bench = field.bench(database)
    rng = random.Random(0)
    choices = [tuple(rng.choice(space.levels) for _ in field.units) for _ in range(24)]
    expected = [found.kl for found in Alone(bench).measure(choices)]
    with connected("local") as ray:
        there = fill_database(field, space, NONE, tmp_path / "spread", ray, quiet=True)
        for unit in field.units:
            for level in space.levels:
                assert there.find(unit.names, level) == database.find(unit.names, level)
        cluster = crew(bench, ray, workers=2)
        assert cluster.at_once == 2
        found = []
        for number, result in enumerate(cluster.measure(choices)):
            found.append(result.kl)
            if number == 3:
                ray.kill(cluster.actors[0], no_restart=False)
    assert found == pytest.approx(expected, rel=1e-5)
