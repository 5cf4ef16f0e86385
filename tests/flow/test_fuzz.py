"""Files of strangers, changed at random: a command works, or says in one line what is wrong and leaves
nothing. (Configs, headers and indexes: test_robustness.py.)"""

import json
import os
import random
import shutil

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file

from srcr.testing import save_tiny_model

pytestmark = pytest.mark.slow

#: Share of the changed files that are tried; 1 takes five minutes.
SHARE = float(os.environ.get("SRCR_FUZZ", "0.35"))

COMPRESS = ["--sparsity", 0.25, "--prune-method", "magnitude", "--bits", 4, "--quant-method", "rtn"]
VALUES = [
    None, True, False, 0, -1, 1, 7, 10**6, 10**20, 0.5, float("nan"), "", "x", "\ud800", "\x00", "a" * 5000,
    "../../x", [], [1], ["x"], [[]], {}, {"a": 1}, {"text": 1}, [{"role": "user", "content": "hi"}],
]  # fmt: skip


def tries(count):
    """How many of so many changed files are tried."""
    return max(3, round(SHARE * count))


class Outcome:
    """Runs commands that may fail, and checks how they do."""

    def __init__(self, srcr, folder):
        self.srcr, self.folder, self.codes = srcr, folder, []

    def run(self, *args, out=None):
        before = set(self.folder.rglob("*"))
        result = self.srcr(*args)
        self.codes.append(result.code)
        assert "Traceback" not in result.err, result.err
        if result.code == 0:
            if out is not None:
                record = json.loads((out / "srcr.json").read_text())["verification"]
                assert record["difference"] <= record["tolerance"]
                shutil.rmtree(out)
            return
        assert result.code == 2, result.err
        assert result.error().isprintable(), result.err
        assert len(result.error()) < 1500, result.err
        assert set(self.folder.rglob("*")) == before

    def both(self):
        """At least one run worked, at least one was refused: what is fuzzed is really read."""
        return {0, 2} <= set(self.codes)


@pytest.fixture
def tiny(tmp_path):
    """A Llama of a single block: there are many runs."""
    return save_tiny_model(tmp_path / "tiny", "llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def speaking(stories, tmp_path_factory):
    """A Llama of a single block with a real tokenizer."""
    folder = save_tiny_model(
        tmp_path_factory.mktemp("speaking") / "model", "llama", num_hidden_layers=1, vocab_size=512
    )
    for path in stories.glob("*token*"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def outcome(srcr, tmp_path):
    return Outcome(srcr, tmp_path)


def changed(value, rng):
    """A JSON value with something in it replaced, dropped or added."""
    value = json.loads(json.dumps(value))
    place = value
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return value
        key = rng.choice(keys)
        if isinstance(place[key], dict | list) and rng.random() < 0.7:
            place = place[key]
            continue
        if rng.random() < 0.3:
            del place[key]
        elif isinstance(place, dict) and rng.random() < 0.1:
            place[rng.choice(["x", "text", "auto_map", ""])] = rng.choice(VALUES)
        else:
            place[key] = rng.choice(VALUES)
        return value


def damaged(data, rng):
    """Bytes cut off, flipped, put in, or all others."""
    data, kind = bytearray(data), rng.randrange(5)
    if kind == 0:
        return bytes(data[: rng.randrange(len(data) + 1)])
    if kind == 1:
        return rng.randbytes(rng.choice([0, 1, 4, 100]))
    for _ in range(rng.choice([1, 3, 30])):
        at = rng.randrange(len(data))
        if kind == 2:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 3:
            data[at:at] = rng.choice([b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b'"', b"{"])
        else:
            data[at] = rng.randrange(256)
    return bytes(data)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"]
)  # fmt: skip
def test_files_beside_the_weights(name, outcome, speaking, tmp_path):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(speaking, model)
    path, rng = model / name, random.Random(f"beside {name}")
    if not path.exists():
        path.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}")
    good, text = path.read_bytes(), tmp_path / "chat.jsonl"
    rows = [{"messages": [{"role": "user", "content": "Once upon a time " * 5}]}] * 6
    text.write_text("\n".join(map(json.dumps, rows)))
    for number in range(9):
        if path.suffix == ".json" and number % 3:
            path.write_text(json.dumps(changed(json.loads(good), rng)))
        else:
            path.write_bytes(damaged(good, rng))
        outcome.run(
            "compress", model, "-o", out, *COMPRESS, "--calibration", text, "--samples", 2,
            "--seq-len", 16, out=out,
        )  # fmt: skip
    assert 0 in outcome.codes or name == "tokenizer.json"


ROWS = [
    {"text": "Once upon a time there was a little dog. " * 4},
    {"messages": [{"role": "user", "content": "Tell me a story."},
                  {"role": "assistant", "content": "Once upon a time. " * 8}]},
    {"conversations": [{"from": "human", "value": "Hi. " * 9}, {"from": "gpt", "value": "Ho. " * 9}]},
    {"instruction": "Write. " * 9, "input": "", "output": "Here it is. " * 9},
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "row"),
    [("txt", 0), *((kind, row) for kind in ("jsonl", "parquet") for row in range(4))],
)
def test_text(kind, row, outcome, speaking, tmp_path):
    rng, out = random.Random(f"text {kind} {row}"), tmp_path / "out"
    rows, path = [ROWS[row]] * 6, tmp_path / f"text.{kind}"
    for number in range(tries(7)):
        table = changed(rows, rng) if number else rows
        if kind == "parquet":
            try:
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
            except (pyarrow.ArrowException, TypeError, AttributeError, ValueError, OverflowError):
                continue  # rows of no one kind
            data = path.read_bytes()
        else:
            lines = map(json.dumps, table) if kind == "jsonl" else [str(table)]
            data = "\n".join(lines).encode("utf-8", "surrogatepass")
        path.write_bytes(data if number % 3 < 2 else damaged(data, rng))
        outcome.run(
            "compress", speaking, "-o", out, *COMPRESS, "--calibration", path, "--seq-len", 16, out=out
        )  # fmt: skip
    assert 0 in outcome.codes


def token_file(rng, path):
    """Token ids of many shapes and kinds, with masks of many."""
    most = rng.choice([96] * 4 + [97, 2**40])
    shape = rng.choice([(6, 24)] * 6 + [(6, 1), (6, 0), (0, 24), (144,), (2, 3, 24)])
    ids = torch.randint(rng.choice([0, 0, 0, -1]), most, shape)
    kinds = [torch.int64] * 6 + [torch.int32, torch.int16, torch.float32, torch.bool, torch.uint8]
    tensors = {rng.choice(["input_ids"] * 9 + ["ids"]): ids.to(rng.choice(kinds)).contiguous()}
    if rng.random() < 0.6:
        mask = torch.ones(rng.choice([tuple(ids.shape)] * 6 + [(6, 23), (6,)]))
        cut = rng.randrange(24)
        if rng.random() < 0.7 and mask.ndim == 2:
            mask[rng.randrange(6) :, rng.choice([slice(cut), slice(cut, None)])] = 0
        if rng.random() < 0.2 and mask.numel():
            mask.view(-1)[rng.randrange(mask.numel())] = rng.choice([0, 2, -1, float("nan")])
        tensors["attention_mask"] = mask.to(rng.choice(kinds))
    save_file(tensors, path)
    if rng.random() < 0.2:
        path.write_bytes(damaged(path.read_bytes(), rng))


def test_token_files(outcome, tiny, tmp_path):
    rng, path, out = random.Random("tokens"), tmp_path / "ids.safetensors", tmp_path / "out"
    torch.manual_seed(0)
    for _ in range(tries(45)):
        token_file(rng, path)
        outcome.run("compress", tiny, "-o", out, *COMPRESS, "--calibration", path, out=out)
    assert outcome.both()


@pytest.mark.parametrize("name", ["plan.yaml", "srcr.json"])
def test_plans_and_records(name, outcome, tiny, ids, tmp_path):
    compressed, out, report = (tmp_path / part for part in ("compressed", "out", "report.html"))
    outcome.run("compress", tiny, "-o", compressed, *COMPRESS, "--calibration", ids)
    assert outcome.codes == [0]
    rng, path = random.Random(f"record {name}"), compressed / name
    good = path.read_bytes()
    for number in range(tries(16)):
        data = damaged(good, rng)
        if name == "srcr.json" and number % 4:
            data = json.dumps(changed(json.loads(good), rng)).encode()
        path.write_bytes(data)
        if name == "plan.yaml":
            outcome.run("compress", tiny, "-o", out, "--plan", path, "--calibration", ids, out=out)
        elif number % 2:
            outcome.run("evaluate", tiny, compressed, "--text", ids)
        else:
            outcome.run("report", compressed, "-o", report)
            report.unlink(missing_ok=True)
    assert outcome.both()


def test_evaluations_and_tables(outcome, tiny, ids, tmp_path):
    evaluation, report = tmp_path / "evaluation.json", tmp_path / "report.html"
    table, plan = tmp_path / "table.json", tmp_path / "plan.yaml"
    outcome.run("evaluate", tiny, tiny, "--text", ids, "-o", evaluation)
    rows = torch.randint(0, 96, (30, 16), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": rows}, tmp_path / "rows.safetensors")
    outcome.run("sensitivity", tiny, "-o", table, "--calibration", tmp_path / "rows.safetensors")
    assert outcome.codes == [0, 0]
    rng, good, known = random.Random("tables"), evaluation.read_bytes(), table.read_bytes()
    for number in range(tries(16)):
        path, data = (evaluation, good) if number % 2 else (table, known)
        path.write_bytes(
            json.dumps(changed(json.loads(data), rng)).encode() if number % 4 < 3 else damaged(data, rng)
        )  # fmt: skip
        if number % 2:
            outcome.run("report", evaluation, "-o", report)
            report.unlink(missing_ok=True)
        else:
            outcome.run("plan", tiny, "--table", table, "--target", "tcr=0.8", "-o", plan)
            plan.unlink(missing_ok=True)
    assert 2 in outcome.codes


NAMES = [
    "a b", " ", "-x", "--help", "é", "日本", "a\nb", "a\tb", "\udcff", "'", '"', "$HOME", "a;b", "[red]",
    "%s", "{x}", "~", "~nobody", "a" * 255, "a" * 256, "a/b", "a/../b", ".hidden", "con", "*", "a\\b", "#",
    "\x7f", "<b>", "|", "a: b", "- a", "&x", "\u202e", "\x1b[31m", "null", "1e5",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names(name, outcome, ids, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        folder = save_tiny_model(
            tmp_path / "m" / name.replace("/", "_"), "llama", num_hidden_layers=1
        )
    except (OSError, UnicodeError):
        folder = save_tiny_model(tmp_path / "m" / "plain", "llama", num_hidden_layers=1)
    out = tmp_path / "o" / name
    (tmp_path / "o").mkdir()
    outcome.run("compress", folder, "-o", out, *COMPRESS, "--calibration", ids)
    outcome.run("inspect", os.fspath(folder))
    outcome.run("inspect", f"./nowhere {name}")
