"""verify(): engines that agree, that differ, that are not there, and what was recorded."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import srcr
from srcr.engines import engines, get_engine
from srcr.errors import InputError
from srcr.pipelines.verify import RECORDED
from srcr.testing import save_tiny_model

QUIET = srcr.RunOptions(0, quiet=True)
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "head_dim": 32,
        "num_key_value_heads": 1}  # fmt: skip


@pytest.fixture(scope="module")
def tokens():
    ids = torch.arange(4 * 40).view(4, 40) * 7 % 96
    return srcr.Tokens.of(ids, "test")


def compressed(folder, tokens, fmt, **quant):
    base = save_tiny_model(folder / "base", "llama", **WIDE)
    recipe = srcr.Recipe(srcr.PruneSpec(sparsity=0.25), srcr.QuantSpec(num_bits=4, **quant))
    srcr.compress(base, srcr.Output(folder / "out", format=fmt), recipe, tokens, QUIET)
    return folder / "out"


def outcomes(result):
    return {check.engine: check.outcome for check in result.checks}


def test_transformers_and_the_record_agree(tmp_path, tokens):
    out = compressed(tmp_path, tokens, "compressed-tensors")
    result = srcr.verify(out, options=QUIET)
    assert result.passed
    assert result.tokens == 32
    assert outcomes(result) == {
        RECORDED: "agrees", "llama.cpp": "skipped", "transformers": "agrees", "vllm": "skipped",
    }  # fmt: skip
    by_name = {check.engine: check for check in result.checks}
    assert by_name["llama.cpp"].reason == "it does not read compressed-tensors"
    assert by_name["transformers"].difference < 1e-4
    assert by_name[RECORDED].top1_agreement == 1.0


def test_llama_cpp_agrees(tmp_path, tokens):
    pytest.importorskip("gguf")
    if (reason := get_engine("llama.cpp").unavailable()) is not None:
        pytest.skip(reason)
    result = srcr.verify(compressed(tmp_path, tokens, "gguf"), ["llama.cpp"], QUIET)
    assert result.passed
    assert outcomes(result) == {RECORDED: "agrees", "llama.cpp": "agrees"}


def test_an_archive_is_compared_with_its_record(tmp_path, tokens):
    pytest.importorskip("constriction")
    result = srcr.verify(compressed(tmp_path, tokens, "archive"), options=QUIET)
    assert result.passed
    assert outcomes(result)[RECORDED] == "agrees"


def test_an_export_keeps_what_was_recorded(tmp_path, tokens):
    out = compressed(tmp_path, tokens, "compressed-tensors")
    srcr.export(out, srcr.Output(tmp_path / "dense", format="dense"), QUIET)
    result = srcr.verify(tmp_path / "dense", ["transformers"], QUIET)
    assert outcomes(result) == {RECORDED: "agrees", "transformers": "agrees"}


def test_weights_that_changed_differ_from_the_record(tmp_path, tokens):
    out = compressed(tmp_path, tokens, "compressed-tensors")
    weights = load_file(out / "model.safetensors")
    weights["model.norm.weight"] *= -1
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    result = srcr.verify(out, ["transformers"], QUIET)
    assert outcomes(result) == {RECORDED: "differs", "transformers": "agrees"}
    assert not result.passed


def test_an_engine_that_computes_otherwise_or_fails_is_told(tmp_path, tokens, monkeypatch):
    out = compressed(tmp_path, tokens, "dense", group_size=-1)
    real = get_engine("transformers")

    def fail(folder, ids):
        raise RuntimeError("no such kernel\nand more")

    wrong = {
        "differs": lambda folder, ids: -real.logits(folder, ids),
        "fails": fail,
        "is narrow": lambda folder, ids: real.logits(folder, ids)[..., :5],
    }
    for name, logits in wrong.items():
        monkeypatch.setitem(engines(), name, replace(real, name=name, logits=logits))
    result = srcr.verify(out, list(wrong), QUIET)
    assert outcomes(result) == {
        RECORDED: "agrees", "differs": "differs", "fails": "fails", "is narrow": "fails",
    }  # fmt: skip
    reasons = [check.reason for check in result.checks]
    assert reasons[2:] == [
        "no such kernel",
        "it gives logits of shape [1, 32, 5] instead of [1, 32, 96]",
    ]
    assert not result.passed


def test_a_checkpoint_without_a_record_is_compared_all_the_same(tmp_path, tokens):
    out = compressed(tmp_path, tokens, "compressed-tensors")
    (out / "srcr.json").unlink()
    assert outcomes(srcr.verify(out, ["transformers"], QUIET)) == {"transformers": "agrees"}


def test_a_record_of_another_vocabulary_is_refused(tmp_path, tokens):
    out = compressed(tmp_path, tokens, "compressed-tensors")
    record = json.loads((out / "srcr.json").read_text(encoding="utf-8"))
    record["probe"]["top1"][0] = 96
    (out / "srcr.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(InputError, match="speaks of another vocabulary"):
        srcr.verify(out, ["transformers"], QUIET)


def test_an_engine_that_is_not_known_is_refused(tmp_path, tokens):
    out = compressed(tmp_path, tokens, "compressed-tensors")
    with pytest.raises(InputError, match=r"engine 'ollama' is not known: use llama\.cpp, transf"):
        srcr.verify(out, ["ollama"], QUIET)
