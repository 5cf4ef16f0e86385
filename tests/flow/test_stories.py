"""From the command line to a reloaded checkpoint, on a real model."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow

SPARSITY, BITS = 0.25, 4
KEYS = {"base", "compressed", "rates", "divergence", "semantic", "tasks", "sr", "srcr"}
RATES = {"sparsity", "bits", "tcr", "zeros", "base_bytes", "stored_bytes", "loaded_bytes", "engine"}


@pytest.fixture(scope="module")
def compressed(stories, stories_text, srcr_process, tmp_path_factory):
    """(folder, what the command printed) of one real compression."""
    out = tmp_path_factory.mktemp("stories") / "out"
    result = srcr_process(
        "compress", stories, "-o", out, "--sparsity", SPARSITY, "--bits", BITS,
        "--calibration", stories_text, "--samples", 32, "--seq-len", 128, "--json",
    )  # fmt: skip
    assert result.code == 0, result.err
    return out, result


@pytest.fixture(scope="module")
def reloaded(compressed):
    """The compressed model as any user of transformers would load it, after a forward pass."""
    model = AutoModelForCausalLM.from_pretrained(compressed[0]).eval()
    with torch.no_grad():
        model(torch.arange(8)[None])
    return model


@pytest.fixture(scope="module")
def evaluation_ids(stories, stories_text, tmp_path_factory):
    """Tokens of the same kind that calibration did not see."""
    tokenizer = AutoTokenizer.from_pretrained(stories)
    stream = tokenizer(stories_text.read_text(encoding="utf-8"))["input_ids"][32 * 128 :]
    ids = torch.tensor(stream[: 12 * 96]).view(12, 96)
    path = tmp_path_factory.mktemp("text") / "ids.safetensors"
    save_file({"input_ids": ids}, path)
    return path, ids


def linears(model):
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def test_every_linear_is_pruned_and_on_its_grid(stories, reloaded):
    base = linears(AutoModelForCausalLM.from_pretrained(stories))
    weights = linears(reloaded)
    assert set(weights) == set(base)
    for name, weight in weights.items():
        assert weight.shape == base[name].shape
        assert weight.dtype == base[name].dtype
        assert int((weight == 0).sum()) >= round(SPARSITY * weight.numel()), name
        assert max(len(row.unique()) for row in weight) <= 2**BITS, name
        assert 0.5 < float(weight.detach().norm() / base[name].detach().norm()) < 1.5


def test_nothing_else_has_changed(stories, reloaded):
    base = AutoModelForCausalLM.from_pretrained(stories).state_dict()
    compressed_names = {f"{name}.weight" for name in linears(reloaded)}
    state = reloaded.state_dict()
    for name, tensor in base.items():
        if name not in compressed_names:
            assert torch.equal(state[name], tensor), name


def test_the_record_says_what_is_there(stories, compressed, reloaded):
    out, printed = compressed
    record = json.loads((out / "srcr.json").read_text())
    rates = record["rates"]
    weights = linears(reloaded)
    total = sum(weight.numel() for weight in weights.values())
    pruned = sum(round(SPARSITY * weight.numel()) for weight in weights.values())
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    assert set(rates) >= RATES
    assert rates["sparsity"] == pytest.approx(pruned / total, abs=1e-12)
    assert rates["bits"] == BITS
    assert rates["tcr"] == pytest.approx(1 - (1 - pruned / total) * BITS / 16, abs=1e-12)
    assert rates["zeros"] == pytest.approx(zeros / total, abs=1e-12)
    assert rates["base_bytes"] == (stories / "model.safetensors").stat().st_size
    assert rates["stored_bytes"] == (out / "model.safetensors").stat().st_size
    assert rates["loaded_bytes"] < rates["stored_bytes"] < rates["base_bytes"] / 2
    for layer in record["layers"]:
        weight = weights[layer["name"]]
        assert layer["shape"] == list(weight.shape)
        assert layer["sparsity"] == round(SPARSITY * weight.numel()) / weight.numel()
        assert layer["zeros"] == pytest.approx(float((weight == 0).float().mean()), abs=1e-6)
        assert 0 < layer["error"] < 0.2
    assert len(record["layers"]) == len(weights)
    assert record["format"] == "compressed-tensors"
    assert record["command"].startswith(f"srcr compress {stories.name}")
    assert printed.json() == record | {"out": str(out)}


def test_the_folder_is_complete(stories, compressed):
    out, _ = compressed
    assert {path.name for path in out.iterdir()} == {
        "model.safetensors", "config.json", "srcr.json", "plan.yaml", "run.yaml", "README.md",
        "tokenizer.json", "tokenizer_config.json", "generation_config.json",
    }  # fmt: skip
    assert not out.with_name("out.partial").exists()
    text = "Once upon a time"
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (stories, out)]
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]


def test_it_still_writes_stories(stories, reloaded):
    tokenizer = AutoTokenizer.from_pretrained(stories)
    start = torch.tensor([tokenizer("Once upon a time")["input_ids"]])
    written = reloaded.generate(start, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(written[0]).split("Once upon a time")[1].startswith(", there was a")


@torch.no_grad()
def independent_figures(base, model, ids):
    """KL, agreement and perplexities, one sequence and one position after the other, in float64."""
    kl, agree, loss = [], [], torch.zeros(2, dtype=torch.float64)
    for row in ids:
        p = base(row[None]).logits[0].double().log_softmax(-1)
        q = model(row[None]).logits[0].double().log_softmax(-1)
        for t in range(len(row) - 1):
            kl.append(float((p[t].exp() * (p[t] - q[t])).sum()))
            agree.append(float(p[t].argmax() == q[t].argmax()))
            loss += torch.stack([-p[t, row[t + 1]], -q[t, row[t + 1]]])
    n = len(kl)
    return sum(kl) / n, sum(agree) / n, *(math.exp(float(x) / n) for x in loss), n


def test_evaluate_agrees_with_an_independent_computation(
    stories, compressed, reloaded, evaluation_ids, srcr, tmp_path
):
    out, _ = compressed
    path, ids = evaluation_ids
    report = tmp_path / "report.json"
    result = srcr("evaluate", stories, out, "-o", report, "--text", path, "--json")
    assert result.code == 0, result.err
    data = json.loads(report.read_text())
    assert result.json() == data
    assert set(data) >= KEYS
    assert set(data["rates"]) >= RATES
    assert set(data["divergence"]) == {"kl", "top1_agreement", "flips", "perplexity", "n_tokens"}
    assert set(data["divergence"]["kl"]) == {
        "value",
        "ci95",
        "p50",
        "p95",
        "p99",
        "p999",
        "histogram",
    }
    assert set(data["divergence"]["top1_agreement"]) == {"value", "ci95"}
    assert set(data["divergence"]["perplexity"]) == {"base", "compressed", "ratio"}
    assert (data["semantic"], data["tasks"], data["sr"], data["srcr"]) == (None, {}, None, None)
    assert (data["base"], data["compressed"]) == (str(stories), str(out))
    base = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
    kl, agree, base_ppl, ppl, n = independent_figures(base, reloaded, ids)
    divergence = data["divergence"]
    assert divergence["kl"]["value"] == pytest.approx(kl, rel=1e-4)
    assert divergence["top1_agreement"]["value"] == pytest.approx(agree, rel=1e-4)
    assert divergence["perplexity"]["base"] == pytest.approx(base_ppl, rel=1e-4)
    assert divergence["perplexity"]["compressed"] == pytest.approx(ppl, rel=1e-4)
    assert divergence["n_tokens"] == n == 12 * 95
    for estimate in (divergence["kl"], divergence["top1_agreement"]):
        low, high = estimate["ci95"]
        assert low < estimate["value"] < high
    assert divergence["kl"]["p99"] > divergence["kl"]["ci95"][1]
    record = json.loads((out / "srcr.json").read_text())["rates"]
    assert data["rates"] == record


def test_several_candidates_give_a_list_and_the_base_itself_diverges_by_nothing(
    stories, compressed, evaluation_ids, srcr
):
    out, _ = compressed
    result = srcr("evaluate", stories, out, stories, "--text", evaluation_ids[0], "--json")
    assert result.code == 0, result.err
    ours, itself = result.json()
    assert (ours["compressed"], itself["compressed"]) == (str(out), str(stories))
    assert ours["divergence"]["kl"]["value"] > 0.01
    assert itself["divergence"]["kl"]["value"] == pytest.approx(0, abs=1e-7)
    assert itself["divergence"]["top1_agreement"]["value"] == 1
    perplexity = itself["divergence"]["perplexity"]
    assert (
        perplexity["base"] == perplexity["compressed"] == ours["divergence"]["perplexity"]["base"]
    )
    assert itself["rates"]["tcr"] == 0
    assert itself["rates"]["bits"] == 16


def test_a_checkpoint_without_a_record_is_rated_from_its_files(
    stories, compressed, reloaded, evaluation_ids, srcr, tmp_path
):
    out, _ = compressed
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((out / name).read_bytes())
    result = srcr("evaluate", stories, bare, "--text", evaluation_ids[0], "--samples", 2, "--json")
    assert result.code == 0, result.err
    rates = result.json()["rates"]
    recorded = json.loads((out / "srcr.json").read_text())["rates"]
    assert rates["source"] != recorded["source"]
    for key in ("bits", "base_bytes", "stored_bytes", "loaded_bytes", "engine", "entropy_bits"):
        assert rates[key] == recorded[key]
    assert rates["zeros"] == pytest.approx(recorded["zeros"], abs=1e-9)


def test_measuring_on_the_calibration_text_is_said(stories, stories_text, compressed, srcr):
    result = srcr(
        "evaluate", stories, compressed[0], "--text", stories_text, "--samples", 32,
        "--seq-len", 128, "--json",
    )  # fmt: skip
    assert result.code == 0
    assert "was calibrated on" in " ".join(result.err.split())


def test_a_disk_that_fills_up(stories, stories_text, srcr_process, tmp_path):
    """No file may grow beyond 100 kB: real writes fail, as on a full disk."""
    pytest.importorskip("resource")
    out = tmp_path / "out"
    result = srcr_process(
        "compress", stories, "-o", out, "--calibration", stories_text, "--samples", 2,
        "--seq-len", 32, "--quant-method", "rtn",
        file_limit=100_000,
    )  # fmt: skip
    assert result.code == 1, result.err
    assert f"writing {out} failed" in result.error()
    assert "5 finished blocks are in" in result.error()
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
