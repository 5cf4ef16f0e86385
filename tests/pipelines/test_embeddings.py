"""Embeddings are rounded before the walk, and the walk sees what they give."""

import pytest
import torch

import srcr
from srcr.data.tokens import Tokens
from srcr.errors import InputError
from srcr.models.checkpoint import open_model
from srcr.models.load import load_model
from srcr.pipelines import compress as pipeline
from srcr.pipelines.embeddings import round_embeddings, round_to_nearest
from srcr.pipelines.options import Output, RunOptions
from srcr.plans.plan import CompressionPlan, LayerPlan, Recipe
from srcr.plans.specs import QuantSpec
from srcr.serialize import from_yaml
from srcr.testing import save_tiny_model

QUIET = RunOptions(quiet=True)
CPU = torch.device("cpu")
RECIPE = Recipe(None, QuantSpec("rtn", 4, 16), embeddings=QuantSpec("gptq", 8, 16))


@pytest.fixture
def ids():
    return Tokens.of(torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_are_rounded_on_their_own(monkeypatch, symmetric, bits):
    W = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    quant = QuantSpec("gptq", bits, 16, symmetric)
    whole = round_to_nearest(W, quant, torch.bfloat16, CPU)
    monkeypatch.setattr("srcr.pipelines.embeddings.CHUNK_ELEMENTS", 3 * 32)
    chunks = round_to_nearest(W, quant, torch.bfloat16, CPU)
    assert torch.equal(whole.dequantize(), chunks.dequantize())
    error = (whole.dequantize() - W).square().sum() / W.square().sum()
    assert whole.error == pytest.approx(float(error), rel=1e-4)
    plain = round_to_nearest(W, QuantSpec("rtn", bits, 16, symmetric), torch.bfloat16, CPU)
    assert whole.error <= plain.error


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("given", ["folder", "memory"])
def test_the_overlay_shows_them_rounded(tmp_path, tied, given):
    folder = save_tiny_model(tmp_path / "base", "llama", tie_word_embeddings=tied)
    opened = open_model(folder if given == "folder" else load_model(folder))
    names = list(opened.topology.embeddings)
    assert names == ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
    layers = tuple(LayerPlan(name, None, QuantSpec("rtn", 4, 16)) for name in names)
    plan = CompressionPlan((), embeddings=layers)
    rounded = round_embeddings(opened, plan, CPU, tmp_path, quiet=True)
    assert [record.name for record in rounded.records] == names
    for name in names:
        before, after = opened.blockwise.matrix(name), rounded.opened.blockwise.matrix(name)
        expected = round_to_nearest(before, layers[0].quant, torch.float32, CPU).dequantize()
        assert torch.equal(after, expected)
    norm = "model.norm.weight"
    assert torch.equal(opened.blockwise.tensor(norm), rounded.opened.blockwise.tensor(norm))
    assert round_embeddings(opened, CompressionPlan(()), CPU, tmp_path, True).opened is opened


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("family", ["gemma3", "gpt_neox", "gpt2"])
def test_the_walk_is_calibrated_on_them(tmp_path, monkeypatch, ids, family, whole):
    """What was walked is what reads back; formats without codes hold them rounded."""
    monkeypatch.setattr(pipeline, "logits_fit", lambda *_: whole)
    base = save_tiny_model(tmp_path / "base", family)
    record = srcr.compress(base, tmp_path / "out", RECIPE, ids, QUIET)
    assert record.verification.difference <= record.verification.tolerance / 4
    assert record.rates.bits == 4  # TCr is of the blocks' linears
    assert {each.bits for each in record.embeddings} == {8}
    plan = from_yaml(CompressionPlan, tmp_path / "out/plan.yaml")
    assert [layer.name for layer in plan.embeddings] == [each.name for each in record.embeddings]
    assert record.format == ("dense" if family == "gpt2" else "compressed-tensors")
    card = (tmp_path / "out/README.md").read_text()
    assert f"| {record.embeddings[0].name} | 8 bits |" in card
    assert ("srcr.load" in card) == (record.loader == "srcr") == (family != "gpt2")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == [
        "model.safetensors"
    ]


@pytest.mark.slow
def test_everything_works_on_the_result(tmp_path, ids):
    base, out = save_tiny_model(tmp_path / "base", "gemma3"), tmp_path / "out"
    record = srcr.compress(base, out, RECIPE, ids, QUIET)
    assert record.loader == "srcr"
    inspected = srcr.inspect(out)
    assert [(each.name, each.bits) for each in inspected.embeddings] == [("model.embed_tokens", 8)]
    assert [each.bits for each in srcr.inspect(base).embeddings] == [16]
    dense = srcr.export(out, Output(tmp_path / "dense", format="dense"), QUIET)
    assert (dense.loader, dense.embeddings) == ("transformers", record.embeddings)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        logits = [srcr.load(each)(tokens).logits for each in (out, tmp_path / "dense")]
    assert torch.equal(*logits)
    small, same = srcr.evaluate(base, [out, tmp_path / "dense"], ids, options=QUIET)
    assert small.divergence == same.divergence
    assert small.divergence.kl.value > 0
    again = Output(out, resume=True)
    assert srcr.compress(base, again, RECIPE, ids, QUIET).seconds == record.seconds  # already done
    other = Recipe(None, RECIPE.quant, embeddings=QuantSpec("gptq", 6, 16))
    with pytest.raises(InputError, match="another plan"):
        srcr.compress(base, again, other, ids, QUIET)


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_bytes(tmp_path, monkeypatch, ids):
    base = save_tiny_model(tmp_path / "base", "llama", tie_word_embeddings=False)
    srcr.compress(base, tmp_path / "whole", RECIPE, ids, QUIET)
    real = pipeline._write

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        srcr.compress(base, tmp_path / "out", RECIPE, ids, QUIET)
    monkeypatch.setattr(pipeline, "_write", real)
    srcr.compress(base, Output(tmp_path / "out", resume=True), RECIPE, ids, QUIET)
    for name in ("model.safetensors", "config.json", "plan.yaml"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
