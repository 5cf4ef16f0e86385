"""GGUF: blocks, six families in llama.cpp itself, tokenizers, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import srcr
from gguf_files import EXACT, FORMAT, IDS, ROUNDED, differences, needs_llama, written
from srcr.errors import InputError
from srcr.formats import detect
from srcr.formats.gguf.blocks import BLOCK, BY_NAME, block_type, pack_blocks, unpack_blocks
from srcr.formats.verify import verify_tensors
from srcr.models.checkpoint import open_model
from srcr.numerics.compressed import CompressedWeight
from srcr.numerics.grid import Grid, code_range
from srcr.storage.layout import GGUF
from srcr.testing.checkpoints import compressed_checkpoint
from srcr.testing.families import save_tiny_model, tiny_model

gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("srcr.engines.llama_cpp")
#: Settings of each family that llama.cpp computes; head sizes and widths that blocks divide.
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
GROUPED = WIDE | {"num_key_value_heads": 1, "head_dim": 32}
FAMILIES = {
    "llama": GROUPED,
    "llama with biases": GROUPED | {"attention_bias": True},
    "llama, tied": GROUPED | {"tie_word_embeddings": True},
    "mistral": GROUPED | {"sliding_window": None},
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "gemma3": GROUPED
    | {
        "num_hidden_layers": 6,
        "query_pre_attn_scalar": 32,
        "sliding_window": 8,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
        },
    },
    "phi3": WIDE | {"num_key_value_heads": 1, "sliding_window": None},
}


def tiny(name, dtype=torch.float32, **changes):
    """The tiny model of a row of FAMILIES, its norms and biases random too."""
    model = tiny_model(name.split(",")[0].split(" ")[0], dtype, **FAMILIES[name] | changes)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def weights(rows, groups, group_size, bits, seed):
    """A random quantized weight with scales of 16 bits, one group of it zeros."""
    generator = torch.Generator().manual_seed(seed)
    low, high = code_range(bits)
    codes = torch.randint(low, high + 1, (rows, groups * group_size), generator=generator)
    codes[:, :group_size] = 0
    scale = (torch.rand(rows, groups, generator=generator) - 0.5).half().float()
    scale[:, 0] = 1 / 3  # of zeros: it need not be a number of 16 bits
    grid = Grid(scale, None, bits, group_size, torch.float32)
    return CompressedWeight(None, 0.0, codes.to(torch.int8), grid)


class TestBlocks:
    @given(
        rows=st.integers(1, 5),
        groups=st.integers(1, 3),
        factor=st.integers(1, 3),
        bits=st.integers(2, 8),
        seed=st.integers(0, 99),
    )
    def test_ggml_reads_what_was_packed(self, rows, groups, factor, bits, seed):
        weight = weights(rows, groups, factor * BLOCK, bits, seed)
        data, kind = pack_blocks(weight), block_type(bits)
        expected = weight.dequantize()
        dequantize = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind.name])
        assert np.array_equal(dequantize, expected.numpy())
        again = unpack_blocks(data, kind)
        assert torch.equal(again.codes, weight.codes)
        exact = replace(again.grid, dtype=torch.float32)
        assert torch.equal(exact.dequantize(again.codes), expected)
        assert data.nbytes == weight.codes.numel() // BLOCK * kind.size

    @pytest.mark.parametrize("kind", BY_NAME.values(), ids=BY_NAME)
    def test_sizes_are_those_of_ggml(self, kind):
        columns, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]]
        assert (columns, size) == (kind.columns, kind.size)

    def test_a_scale_that_is_no_float16_is_refused(self):
        weight = weights(2, 2, BLOCK, 4, 0)
        weight.grid.scale[1, 1] = 0.1
        with pytest.raises(InputError, match=r"a\.b has one of 0\.100000.* --format gguf"):
            pack_blocks(weight, "a.b")


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 5, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_transformers_does(tmp_path, family, bits):
    needs_llama()
    recipe = srcr.Recipe(
        srcr.PruneSpec("magnitude", 0.25),
        srcr.QuantSpec("rtn", bits),
        embeddings=srcr.QuantSpec("rtn", 8),
    )
    checkpoint = written(tiny(family), recipe, tmp_path / "out")
    engine, loaded = differences(tmp_path / "out", checkpoint)
    assert engine < ROUNDED
    assert loaded < 1e-5
    verify_tensors(FORMAT, checkpoint, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_pruned_only_is_exact(tmp_path, family, dtype):
    needs_llama()
    recipe = srcr.Recipe(srcr.PruneSpec.of("magnitude", 0, "2:4"), None)
    checkpoint = written(tiny(family, dtype), recipe, tmp_path / "out")
    engine, loaded = differences(tmp_path / "out", checkpoint)
    # llama.cpp rounds activations to the precision of the weights that they are multiplied by.
    assert engine < (EXACT if dtype != torch.bfloat16 else ROUNDED)
    assert loaded < 1e-5
    verify_tensors(FORMAT, checkpoint, tmp_path / "out")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 3.0, "rope_theta": 5000.0},
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32, "rope_theta": 5000.0,
        },
        {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
            "rope_theta": 5000.0,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_rope_that_is_scaled(tmp_path, rope):
    needs_llama()
    model = tiny("llama", rope_parameters=rope)
    checkpoint = written(model, srcr.Recipe(None, None), tmp_path / "out")
    assert differences(tmp_path / "out", checkpoint)[0] < EXACT


@pytest.mark.parametrize("length", [40, 300])
def test_short_and_long_factors_of_phi3(tmp_path, length):
    needs_llama()
    rope = {
        "rope_type": "longrope", "rope_theta": 5000.0, "original_max_position_embeddings": 256,
        "long_factor": [1.0 + i / 4 for i in range(16)],
        "short_factor": [1.0 + i / 9 for i in range(16)],
    }  # fmt: skip
    model = tiny("phi3", rope_parameters=rope, max_position_embeddings=512)
    model.config.original_max_position_embeddings = 256
    checkpoint = written(model, srcr.Recipe(None, None), tmp_path / "out")
    ids = torch.arange(length)[None] * 7 % 96
    assert differences(tmp_path / "out", checkpoint, ids)[0] < EXACT


def test_narrow_codes_and_whole_rows_are_kept(tmp_path):
    recipe = srcr.Recipe(
        None, srcr.QuantSpec("rtn", 3, -1), overrides={"*.q_proj": srcr.Override(bits=6)}
    )
    checkpoint = written(tiny("llama"), recipe, tmp_path / "out")
    read = verify_tensors(FORMAT, checkpoint, tmp_path / "out")
    assert {s.num_bits for s in read.contents.schemes.values()} == {4, 8}
    assert any(
        "3 and 6 bits are stored as Q4_0 and Q8_0" in note
        for note in FORMAT.notes(checkpoint.contents)
    )


@pytest.mark.slow
def test_a_window_that_llama_cpp_does_not_have_is_said_aloud():
    for window, noted in ((None, False), (16, True)):
        model = tiny("mistral", sliding_window=window)
        checkpoint = compressed_checkpoint(
            model, srcr.Recipe(None, srcr.QuantSpec("rtn", 4)), FORMAT
        )
        notes = " ".join(FORMAT.notes(checkpoint.contents))
        assert ("texts of at most 16 tokens" in notes) is noted


def test_narrow_codes_are_not_passed_off_as_wider_ones(tmp_path):
    """Files of blocks do not say that codes had 3 bits: the record does."""
    base = save_tiny_model(tmp_path / "base", "llama", **GROUPED)
    ids = srcr.Tokens.of(torch.arange(4 * 40).view(4, 40) * 7 % 96)
    out = srcr.Output(tmp_path / "out", format="gguf")
    options = srcr.RunOptions(0, quiet=True)
    srcr.compress(base, out, srcr.Recipe(None, srcr.QuantSpec(num_bits=3)), ids, options)
    other = srcr.Output(tmp_path / "ct", format="compressed-tensors")
    with pytest.raises(InputError, match=r"stores the 3-bit codes of .* in 4 bits: export the"):
        srcr.export(tmp_path / "out", other, options)
    srcr.export(tmp_path / "out", srcr.Output(tmp_path / "dense", format="dense"), options)
    with pytest.raises(InputError, match=r"stores the 3-bit codes of .* in 4 bits, so that"):
        srcr.recover(
            base, tmp_path / "out", srcr.Output(tmp_path / "better"), srcr.RecoverySpec(steps=1),
            srcr.RecoveryText(("self",), 4, 16, "self"), options,
        )  # fmt: skip


def test_a_plan_for_gguf_is_refused_by_a_format_that_stores_other_scales(tmp_path):
    base = save_tiny_model(tmp_path / "base", "llama", torch.bfloat16, **GROUPED)
    ids = srcr.Tokens.of(torch.arange(4 * 40).view(4, 40) * 7 % 96)
    options = srcr.RunOptions(0, quiet=True)
    for scales, fmt in (("float16", "compressed-tensors"), ("bfloat16", "gguf")):
        recipe = srcr.Recipe(None, srcr.QuantSpec(num_bits=4, scale_dtype=scales))
        with pytest.raises(InputError, match=f"wants {scales} scales .*, which {fmt} does not"):
            srcr.compress(base, srcr.Output(tmp_path / "out", format=fmt), recipe, ids, options)


def test_a_gguf_beside_a_model_in_safetensors_is_not_the_model(tmp_path):
    base = save_tiny_model(tmp_path / "base", "llama")
    (base / GGUF).write_bytes(b"somebody else's")
    assert detect(base).name == "dense"
    assert open_model(base).weight_bytes == (base / "model.safetensors").stat().st_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_norms_of_gemma_3_read_back(tmp_path, dtype):
    model = tiny("gemma3", dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data *= 60
    checkpoint = written(model, srcr.Recipe(None, None), tmp_path / "out")
    verify_tensors(FORMAT, checkpoint, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "quant", "message"),
    [
        ({}, srcr.QuantSpec("rtn", 4, symmetric=False), "has zero-points: use --symmetric"),
        ({}, srcr.QuantSpec("rtn", 4, 16), "has groups of 16: use --group-size 32"),
        ({"intermediate_size": 80}, srcr.QuantSpec("rtn", 4, -1), "the 80 of .* and 1 more: .*--ignore"),
        ({"hidden_act": "relu"}, srcr.QuantSpec("rtn", 4), "llama.cpp computes silu here.*'relu'"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            srcr.QuantSpec("rtn", 4),
            "RoPE of type 'dynamic' is not written yet, but default",
        ),
    ],
)  # fmt: skip
def test_what_gguf_cannot_hold_is_refused(changes, quant, message):
    checkpoint = compressed_checkpoint(tiny("llama", **changes), srcr.Recipe(None, quant), FORMAT)
    with pytest.raises(InputError, match=message):
        FORMAT.check(checkpoint.contents)


def test_other_architectures_are_refused():
    checkpoint = compressed_checkpoint(
        tiny_model("opt"), srcr.Recipe(None, srcr.QuantSpec("rtn", 4, -1)), FORMAT
    )
    with pytest.raises(InputError, match="this model is a opt: use --format compressed-tensors"):
        FORMAT.check(checkpoint.contents)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention"] * 6}, "every 6th block of Gemma 3 see everything"),
        ({"query_pre_attn_scalar": 8}, "root of 32, and the model by that of 8"),
    ],
)
def test_gemma_3_that_llama_cpp_computes_otherwise(changes, message):
    checkpoint = compressed_checkpoint(tiny("gemma3", **changes), srcr.Recipe(None, None), FORMAT)
    with pytest.raises(InputError, match=message):
        FORMAT.check(checkpoint.contents)


def test_a_damaged_file_is_an_input_error(tmp_path):
    written(tiny("llama"), srcr.Recipe(None, srcr.QuantSpec("rtn", 4)), tmp_path / "out")
    path = tmp_path / "out" / GGUF
    data = path.read_bytes()
    for damaged in (
        b"",
        b"FUGG" + data[4:],
        data[: len(data) // 2],
        data[:40],
        data[:8] + b"\xff" * 16 + data[24:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError):
            FORMAT.read(tmp_path / "out")
        with pytest.raises(InputError, match=r"llama\.cpp does not load"):
            llama_cpp.ENGINE.logits(tmp_path / "out", IDS)


def test_without_the_package_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    checkpoint = compressed_checkpoint(tiny_model("llama"), srcr.Recipe(None, None))
    with pytest.raises(InputError, match=r"pip install 'srcr\[gguf\]'"):
        FORMAT.check(checkpoint.contents)


def byte_level_tokenizer(folder, splits):
    """A byte-level BPE tokenizer trained on a few lines, that splits text by ``splits``."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Split(Regex(splits), "isolated")] if splits else []
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splits)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, plain])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return tokenizer


TEXTS = [
    "Once upon a time there was a girl. She didn't like 1234 or 12,345.67!",
    "  two  spaces\n\n\tand lines\r\n and I'LL SHOUT: größer, 我想 🦙🦙",
    "",
    " ",
]


@pytest.mark.parametrize("splitting", ["gpt-2", "llama-bpe", "qwen2"])
def test_llama_cpp_splits_text_as_the_tokenizer_does(tmp_path, splitting):
    needs_llama()
    from srcr.formats.gguf.vocabulary import PRE_TOKENIZER_BY_PATTERN, read_vocabulary

    pattern = {name: regex for regex, name in PRE_TOKENIZER_BY_PATTERN.items()}.get(splitting)
    base = save_tiny_model(tmp_path / "base", "llama", vocab_size=400, **GROUPED)
    tokenizer = byte_level_tokenizer(base, pattern)
    assert read_vocabulary(base, 400).pre_tokenizer == splitting
    written(open_model(base), srcr.Recipe(None, None), tmp_path / "out")
    with llama_cpp.open_llama(tmp_path / "out" / GGUF, 64) as model:
        assert [model.tokenize(text) for text in TEXTS] == [tokenizer.encode(t).ids for t in TEXTS]


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused_before_the_work(tmp_path):
    base = save_tiny_model(tmp_path / "base", "llama", vocab_size=400, **GROUPED)
    byte_level_tokenizer(base, r"\w+|\W+")
    output = srcr.Output(tmp_path / "out", format="gguf")
    with pytest.raises(InputError, match="this way is not among those that srcr knows"):
        srcr.compress(base, output, srcr.Recipe(None, srcr.QuantSpec()), "self")


def test_special_tokens_come_from_the_config_where_no_other_file_names_them(tmp_path):
    from srcr.formats.gguf.vocabulary import read_vocabulary

    base = save_tiny_model(tmp_path / "base", "llama", vocab_size=400, **GROUPED)
    byte_level_tokenizer(base, None)
    (base / "tokenizer_config.json").unlink()
    assert read_vocabulary(base, 400).special == {"bos": 1, "eos": 2, "pad": 0}


@pytest.mark.slow
class TestARealModel:
    """stories260K: 25 % + 4 bits, but for the down projections, whose width no block divides."""

    @pytest.fixture(scope="class")
    def folder(self, stories, tmp_path_factory):
        needs_llama()
        out = tmp_path_factory.mktemp("gguf") / "out"
        recipe = srcr.Recipe(
            srcr.PruneSpec(sparsity=0.25), srcr.QuantSpec(num_bits=4), ignore=["*.down_proj"]
        )
        output = srcr.Output(out, format="gguf")
        options = srcr.RunOptions(0, quiet=True)
        record = srcr.compress(stories, output, recipe, srcr.Calibration("self", 16, 128), options)
        assert record.rates.engine == "llama.cpp"
        assert record.rates.stored_bytes == (out / GGUF).stat().st_size
        return out

    def test_text_becomes_the_same_tokens(self, folder, stories, stories_text):
        tokenizer = open_model(stories).tokenizer
        text = stories_text.read_text(encoding="utf-8")[:2000]
        with llama_cpp.open_llama(folder / GGUF, 64) as model:
            for each in (text, "é 我 1 <s>", " leading", ""):
                assert model.tokenize(each) == tokenizer(each)["input_ids"]

    @torch.no_grad()
    def test_perplexity_and_greedy_text(self, folder, stories, stories_text):
        tokenizer = open_model(stories).tokenizer
        ids = tokenizer(stories_text.read_text(encoding="utf-8"))["input_ids"]
        rows = torch.tensor(ids[: 8 * 256]).view(8, 256)
        model = srcr.load(folder, torch.float32)
        expected, given = model(rows).logits, llama_cpp.ENGINE.logits(folder, rows)
        losses = [
            torch.nn.functional.cross_entropy(each[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
            for each in (expected, given)
        ]
        assert abs(float((losses[1] - losses[0]).exp()) - 1) < 0.01
        prompt = rows[:1, :8]
        text = model.generate(prompt, max_new_tokens=24, do_sample=False)
        with llama_cpp.open_llama(folder / GGUF, 64) as engine:
            own = prompt
            while own.shape[1] < text.shape[1]:
                own = torch.cat([own, engine.logits(own)[:, -1].argmax(-1, keepdim=True)], 1)
        assert torch.equal(own, text)

    def test_it_is_exported_there_and_back(self, folder, tmp_path):
        options = srcr.RunOptions(0, quiet=True)
        srcr.export(folder, srcr.Output(tmp_path / "ct", format="compressed-tensors"), options)
        srcr.export(tmp_path / "ct", srcr.Output(tmp_path / "back", format="gguf"), options)
        assert (tmp_path / "back" / GGUF).read_bytes() == (folder / GGUF).read_bytes()

    def test_it_is_evaluated_like_any_other(self, folder, stories):
        text = srcr.EvaluationText("self", 4, 64)
        [result] = srcr.evaluate(stories, [folder], text, options=srcr.RunOptions(0, quiet=True))
        assert result.rates.engine == "llama.cpp"
        assert result.divergence.kl.value < 0.5
