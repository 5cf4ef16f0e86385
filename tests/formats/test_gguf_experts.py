"""GGUF of mixtures of experts: stacks, what llama.cpp computes of them, and what is refused."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import srcr
from gguf_files import EXACT, FORMAT, IDS, ROUNDED, differences, needs_llama, written
from srcr.errors import InputError
from srcr.formats.gguf.blocks import pack_blocks
from srcr.formats.verify import verify_tensors
from srcr.storage.layout import GGUF
from srcr.testing.checkpoints import compressed_checkpoint

gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("srcr.engines.llama_cpp")
SIZES = {
    "vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "num_experts_per_tok": 2,
}  # fmt: skip
MIXTURES = {
    "mixtral": {"num_local_experts": 8, "head_dim": 32},
    "qwen2_moe": {
        "num_experts": 8, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 128,
    },
    "qwen3_moe": {
        "num_experts": 8, "moe_intermediate_size": 32, "norm_topk_prob": True, "head_dim": 32,
    },
    "olmoe": {"num_experts": 8, "num_key_value_heads": 2},
    "granitemoe": {
        "num_local_experts": 8, "attention_multiplier": 0.2, "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7, "logits_scaling": 2.0,
    },
}  # fmt: skip
QUIET = srcr.RunOptions(0, quiet=True)


def mixture(family, dtype=torch.float32, **changes):
    """A tiny random mixture, its norms and biases random too."""
    config = AutoConfig.for_model(family, **(SIZES | MIXTURES.get(family, {}) | changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.3 * torch.randn(parameter.shape)
            else:
                parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
    return model.to(dtype).eval()


@pytest.mark.parametrize("family", MIXTURES)
def test_llama_cpp_chooses_and_weighs_experts_as_transformers_does(tmp_path, family):
    needs_llama()
    recipe = srcr.Recipe(srcr.PruneSpec.of("magnitude", 0, "2:4"), None)
    checkpoint = written(mixture(family), recipe, tmp_path / "out")
    engine, loaded = differences(tmp_path / "out", checkpoint)
    assert engine < EXACT
    assert loaded < 1e-5
    verify_tensors(FORMAT, checkpoint, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 5, 8])
@pytest.mark.parametrize("family", MIXTURES)
def test_llama_cpp_computes_what_transformers_does(tmp_path, family, bits):
    """With every expert chosen for every token: of two that a router likes about as much, rounded activations
    may choose the other, which is no error of the file's."""
    needs_llama()
    recipe = srcr.Recipe(
        srcr.PruneSpec("magnitude", 0.25),
        srcr.QuantSpec("rtn", bits),
        embeddings=srcr.QuantSpec("rtn", 8),
    )
    model = mixture(family, torch.bfloat16, num_experts_per_tok=8)
    checkpoint = written(model, recipe, tmp_path / "out")
    engine, loaded = differences(tmp_path / "out", checkpoint)
    assert engine < ROUNDED
    assert loaded < 1e-5
    verify_tensors(FORMAT, checkpoint, tmp_path / "out")


def test_experts_are_stacked_and_routers_are_float32(tmp_path):
    recipe = srcr.Recipe(None, srcr.QuantSpec("rtn", 4), ignore=["*.experts.*.down_proj"])
    checkpoint = written(mixture("qwen2_moe", torch.bfloat16), recipe, tmp_path / "out")
    reader = gguf.GGUFReader(tmp_path / "out" / GGUF)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    kinds = {
        name.removeprefix("blk.1."): (tensor.tensor_type.name, tensor.shape.tolist())
        for name, tensor in tensors.items()
    }
    assert kinds["ffn_gate_exps.weight"] == ("Q4_0", [64, 32, 8])
    assert kinds["ffn_down_exps.weight"] == ("BF16", [32, 64, 8])
    assert kinds["ffn_up_shexp.weight"] == ("Q4_0", [64, 128])
    assert kinds["ffn_gate_inp.weight"] == ("F32", [64, 8])
    assert kinds["ffn_gate_inp_shexp.weight"] == ("F32", [64, 1])
    experts = [f"model.layers.1.mlp.experts.{i}.up_proj" for i in range(8)]
    expected = np.stack([pack_blocks(checkpoint.read(name)) for name in experts])
    assert np.array_equal(tensors["blk.1.ffn_up_exps.weight"].data, expected)
    values = {
        key.rpartition(".")[2]: field.contents()
        for key, field in reader.fields.items()
        if key.startswith("qwen2moe.expert")
    }
    assert values == {
        "expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 32,
        "expert_shared_feed_forward_length": 128,
    }  # fmt: skip
    read = FORMAT.read(tmp_path / "out")
    assert read.tensors.meta("model.layers.0.mlp.gate.weight").dtype == torch.bfloat16


def test_super_blocks_of_experts(tmp_path):
    needs_llama()
    model = mixture("qwen3_moe", hidden_size=256, num_experts_per_tok=8)
    checkpoint = written(model, srcr.Recipe(None, srcr.QuantSpec("rtn", 3)), tmp_path / "out")
    reader = gguf.GGUFReader(tmp_path / "out" / GGUF)
    kinds = {t.name: t.tensor_type.name for t in reader.tensors if "exps" in t.name}
    assert kinds["blk.0.ffn_gate_exps.weight"] == "Q3_K"
    assert kinds["blk.0.ffn_down_exps.weight"] == "Q4_0"
    engine, loaded = differences(tmp_path / "out", checkpoint)
    assert engine < ROUNDED
    assert loaded < 1e-5
    verify_tensors(FORMAT, checkpoint, tmp_path / "out")


@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])
def test_it_is_compressed_inspected_and_exported_there_and_back(tmp_path, family):
    base = tmp_path / "base"
    mixture(family, torch.bfloat16).save_pretrained(base)
    tokens = srcr.Tokens.of(torch.arange(8 * 40).view(8, 40) * 7 % 96)
    recipe = srcr.Recipe(srcr.PruneSpec(sparsity=0.25), srcr.QuantSpec(num_bits=4))
    out = srcr.Output(tmp_path / "out", format="gguf")
    record = srcr.compress(base, out, recipe, tokens, QUIET)
    assert record.rates.engine == "llama.cpp"
    assert record.rates.stored_bytes == (tmp_path / "out" / GGUF).stat().st_size
    assert record.verification.loaded_by == "srcr"
    assert srcr.inspect(tmp_path / "out").quantized
    logits = srcr.load(tmp_path / "out", torch.float32)(IDS, use_cache=False).logits
    for fmt in ("archive", "dense"):
        srcr.export(tmp_path / "out", srcr.Output(tmp_path / fmt, format=fmt), QUIET)
    dense = srcr.load(tmp_path / "dense", torch.float32)(IDS, use_cache=False).logits
    assert float((dense - logits).norm() / logits.norm()) < 1e-2  # of the weights in bfloat16
    srcr.export(tmp_path / "archive", srcr.Output(tmp_path / "back", format="gguf"), QUIET)
    assert (tmp_path / "back" / GGUF).read_bytes() == (tmp_path / "out" / GGUF).read_bytes()


def test_experts_of_different_types_are_refused_before_the_work(tmp_path):
    base = tmp_path / "base"
    mixture("mixtral").save_pretrained(base)
    tokens = srcr.Tokens.of(torch.arange(4 * 40).view(4, 40) * 7 % 96)
    output = srcr.Output(tmp_path / "out", format="gguf")
    name = "model.layers.1.mlp.experts.3.up_proj"
    for changes, kinds in (
        ({"overrides": {name: srcr.Override(bits=8)}}, "Q4_0 and Q8_0"),
        ({"ignore": [name]}, "Q4_0 and not quantized"),
    ):
        recipe = srcr.Recipe(None, srcr.QuantSpec("rtn", 4), **changes)
        message = (
            rf"layers\.1\.mlp\.experts\.\*\.up_proj would be {kinds}: .* every expert of a layer"
        )
        with pytest.raises(InputError, match=message):
            srcr.compress(base, output, recipe, tokens, QUIET)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "qwen3_moe",
            {"norm_topk_prob": False},
            "a qwen3_moe with norm_topk_prob True, .* has False",
        ),
        (
            "qwen2_moe",
            {"norm_topk_prob": True},
            "a qwen2_moe with norm_topk_prob False, .* has True",
        ),
        (
            "qwen2_moe",
            {"mlp_only_layers": [0]},
            r"with mlp_only_layers \[\], and this model has \[0\]",
        ),
        ("olmoe", {"clip_qkv": 8.0}, "with clip_qkv None, and this model has 8.0"),
        ("olmoe", {"num_key_value_heads": 1}, "with num_key_value_heads 2, and this model has 1"),
        ("mixtral", {"hidden_act": "gelu"}, "llama.cpp computes silu here"),
        ("phimoe", {"num_local_experts": 8}, "this model is a phimoe: use --format compressed"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(family, changes, message):
    checkpoint = compressed_checkpoint(mixture(family, **changes), srcr.Recipe(None, None), FORMAT)
    with pytest.raises(InputError, match=message):
        FORMAT.check(checkpoint.contents)


def test_a_file_with_fewer_experts_than_the_config_says_is_an_input_error(tmp_path):
    written(mixture("mixtral"), srcr.Recipe(None, srcr.QuantSpec("rtn", 4)), tmp_path / "out")
    config = tmp_path / "out" / "config.json"
    text = config.read_text(encoding="utf-8")
    config.write_text(
        text.replace('"num_local_experts": 8', '"num_local_experts": 9'), encoding="utf-8"
    )
    with pytest.raises(InputError, match="has no expert 8"):
        FORMAT.read(tmp_path / "out")
