"""Models as people bring them: what their files say is what is compressed, whatever their blocks do."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from architectures import tiny_architecture
from srcr.data.tokens import Tokens
from srcr.errors import InputError
from srcr.formats import load
from srcr.models.checkpoint import open_model
from srcr.models.load import load_model
from srcr.models.topology import hidden_states
from srcr.models.validation import check_leftovers
from srcr.pipelines.compress import compress
from srcr.pipelines.options import Output, RunOptions
from srcr.plans.plan import Recipe
from srcr.plans.specs import PruneSpec, QuantSpec
from srcr.testing import save_tiny_model, tiny_model

IDS = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(0))
RECIPE = Recipe(PruneSpec("wanda", 0.25), QuantSpec("rtn", 8, -1))
#: Weights used without a call, persistent buffers, pairs, transposed linears, projections outside the blocks.
KINDS = [
    "qwen3_5_text", "lfm2", "falcon_h1", "bamba", "mamba", "mamba2", "gemma4_text", "opt", "gpt2", "falcon",
    "gpt_bigcode", "nanochat", "openai-gpt", "recurrent_gemma", "rwkv", "bert", "youtu", "gemma3",
]  # fmt: skip


def run(model, tmp_path, **output):
    return compress(
        model, Output(tmp_path / "out", **output), RECIPE, Tokens.of(IDS), RunOptions(quiet=True)
    )


def edit(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_one_by_one_are_the_model(kind, tmp_path):
    model = tiny_architecture(kind)
    for name, buffer in model.state_dict().items():
        if name.endswith("layer_scalar"):
            buffer.fill_(0.7)  # a fresh one is 1
    model.save_pretrained(tmp_path)
    blocks = open_model(tmp_path).blockwise
    expected = load_model(tmp_path)(IDS, use_cache=False).logits
    ((hidden, arguments),) = list(blocks.embed([IDS]))
    for index, (args, kwargs) in enumerate(arguments):
        hidden = hidden_states(blocks.block(index)(hidden, *args, **kwargs))
    torch.testing.assert_close(blocks.logits(IDS, hidden), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["opt", "bert", "gemma3", "gemma4_text"])
def test_linears_outside_the_blocks_are_left_aloud(kind, tmp_path):
    changes = {"word_embed_proj_dim": 16, "do_layer_norm_before": False}
    model = tiny_model("opt", **changes) if kind == "opt" else tiny_architecture(kind)
    model.save_pretrained(tmp_path / "model")
    record = run(str(tmp_path / "model"), tmp_path)
    assert record.format == "compressed-tensors"
    (note,) = [note for note in record.notes if note.startswith("left as they are")]
    topology = open_model(tmp_path / "model").topology
    assert topology.untouched[0] in note
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert set(topology.untouched) <= set(config["ignore"])
    state, out = model.state_dict(), load(tmp_path / "out").state_dict()
    for name in topology.untouched:
        assert torch.equal(state[f"{name}.weight"], out[f"{name}.weight"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["falcon", "gpt_bigcode", "nanochat", "xlstm", "modernbert-decoder"]
)
def test_what_transformers_cannot_load_packed_is_known_before_the_work(kind, tmp_path):
    tiny_architecture(kind).save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model")
    with pytest.raises(InputError, match="--format dense"):
        run(model, tmp_path, format="compressed-tensors")
    record = run(model, tmp_path)
    assert record.format == "dense"
    assert any(note.startswith("format dense: ") for note in record.notes)


class TestTiedHeads:
    """transformers does not tie weights that differ in the files, whatever the config says."""

    @pytest.fixture
    def folder(self, tmp_path):
        return save_tiny_model(tmp_path / "model", "llama", tie_word_embeddings=True)

    def test_a_head_that_differs_stays(self, folder, tmp_path):
        head = torch.randn(96, 32, generator=torch.Generator().manual_seed(3))
        edit(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
        opened = open_model(folder)
        assert not opened.topology.tied
        run(str(folder), tmp_path)
        out = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(out.lm_head.weight, head)
        assert not torch.equal(out.model.embed_tokens.weight, head)
        assert (
            json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
        )

    def test_a_copy_in_the_file_is_tied_all_the_same(self, folder):
        edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
        opened = open_model(folder)
        assert opened.topology.tied
        assert "lm_head.weight" not in opened.blockwise.names()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_where_the_config_names_no_precision_the_files_do(dtype, tmp_path):
    folder = save_tiny_model(tmp_path / "model", "llama", dtype)
    config = json.loads((folder / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config))
    run(str(folder), tmp_path, format="dense")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == dtype


def test_what_is_kept_in_another_precision_is_kept(tmp_path):
    """transformers holds some parameters in float32 beside bfloat16 weights."""
    model = tiny_architecture("flint").bfloat16()
    model.save_pretrained(tmp_path / "plain")
    whole = load_model(tmp_path / "plain").state_dict()
    blocks = open_model(tmp_path / "plain").blockwise
    assert {torch.bfloat16, torch.float32} <= {tensor.dtype for tensor in whole.values()}
    for name in blocks.names():
        assert blocks.tensor(name).dtype == whole[name].dtype


class TestLeftovers:
    """Tensors of the files that the model has no place for."""

    @pytest.fixture
    def folder(self, tmp_path):
        return save_tiny_model(tmp_path / "model", "llama")

    @pytest.mark.parametrize(
        "family", ["llama", "gpt_neox"]
    )  # read from the files, and by transformers
    @pytest.mark.parametrize(
        "part",
        ["weight_scale", "weight_scale_inv", "qzeros", "weight.absmax", "lora_A.weight", "SCB"],
    )
    def test_parts_of_a_stored_weight_are_refused(self, part, family, tmp_path):
        folder = save_tiny_model(tmp_path / family, family)
        names = load_file(folder / "model.safetensors")
        owner = next(n for n in names if n.endswith("down_proj.weight") or "4h_to_h.weight" in n)
        name = owner.removesuffix("weight") + part
        edit(folder, lambda tensors: tensors.update({name: torch.ones(1)}))
        with pytest.raises(InputError, match=r"say how its weights are stored.*original model"):
            open_model(folder)

    @pytest.mark.parametrize("part", ["_scale", "_blocks", "_scale_inv", ".absmax"])
    def test_parts_of_a_stack_of_matrices(self, part, folder):
        names = ["mlp.experts.up_proj", "mlp.gate.weight"]
        with pytest.raises(InputError, match="say how its weights are stored"):
            check_leftovers(folder, [f"mlp.experts.up_proj{part}"], names)
        assert check_leftovers(folder, ["mlp.gate_proj.weight"], names)  # another layer

    def test_float8_with_scales(self, folder):
        def quantize(tensors):
            weight = tensors["model.layers.0.mlp.up_proj.weight"]
            tensors["model.layers.0.mlp.up_proj.weight"] = weight.to(torch.float8_e4m3fn)
            tensors["model.layers.0.mlp.up_proj.weight_scale"] = torch.ones(1)

        edit(folder, quantize)
        with pytest.raises(InputError, match=r"up_proj\.weight_scale first"):
            open_model(folder)

    def test_others_are_left_out_aloud(self, folder, tmp_path):
        names = [
            "model.layers.0.self_attn.rotary_emb.inv_freq",
            "model.layers.2.mlp.up_proj.weight",
        ]
        edit(folder, lambda tensors: tensors.update({name: torch.ones(4) for name in names}))
        record = run(str(folder), tmp_path)
        (note,) = [note for note in record.notes if note.startswith("left out")]
        assert "2 tensors" in note
        assert names[0] in note
