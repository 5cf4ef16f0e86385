"""The gptq layout beside a slow reader of its own, and what is refused.

The layout by AutoGPTQ's packing (auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py) and GPTQModel's reading of
it (gptqmodel/nn_modules/qlinear/__init__.py); benchmarks/loading_gptq.py lets GPTQModel itself load it.
"""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import srcr
from srcr.errors import InputError
from srcr.formats import detect, get_format
from srcr.formats.checkpoint import Contents, Scheme
from srcr.formats.gptq import scheme_of
from srcr.formats.verify import verify_tensors
from srcr.models.checkpoint import open_model
from srcr.plans.plan import CompressionPlan, LayerPlan
from srcr.testing import compressed_checkpoint, save_tiny_model, tiny_model

FORMAT = get_format("gptq")
WIDE = {"intermediate_size": 64, "hidden_size": 64, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32}  # fmt: skip
NAME = "model.layers.0.mlp.down_proj"


def number(words, bits, place):
    """Bits ``place * bits`` onwards of 32-bit words, the lowest first."""
    value = 0
    for bit in range(place * bits, (place + 1) * bits):
        value |= ((words[bit // 32] >> (bit % 32)) & 1) << (bit - place * bits)
    return value


def slow_weight(tensors, module, quantization):
    """The weight [rows, cols] as the layout has it, a number at a time; scales and products in float32."""
    bits = quantization["bits"]
    words, zero_words = (tensors[f"{module}.{key}"].tolist() for key in ("qweight", "qzeros"))
    scales, g_idx = tensors[f"{module}.scales"].float(), tensors[f"{module}.g_idx"].tolist()
    added = 1 if quantization["checkpoint_format"] == "gptq" else 0
    rows, cols = scales.shape[1], len(g_idx)
    weight = torch.empty(rows, cols)
    for row in range(rows):
        column_of_words = [line[row] for line in words]
        for col in range(cols):
            zero = number(zero_words[g_idx[col]], bits, row) + added
            code = number(column_of_words, bits, col)
            weight[row, col] = (code - zero) * scales[g_idx[col], row]
    return weight


def written(tmp_path, recipe, dtype=torch.float32, **changes):
    """A compressed tiny Llama, written; the checkpoint and its config."""
    checkpoint = compressed_checkpoint(tiny_model("llama", dtype, **WIDE | changes), recipe, FORMAT)
    FORMAT.check(checkpoint.contents)
    FORMAT.write(checkpoint, tmp_path)
    return checkpoint, json.loads((tmp_path / "config.json").read_text())["quantization_config"]


def recipe(bits=4, group=-1, symmetric=True):
    return srcr.Recipe(
        srcr.PruneSpec("magnitude", 0.25), srcr.QuantSpec("rtn", bits, group, symmetric)
    )


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", [-1, 16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_width_by_bit_arithmetic(tmp_path, bits, group, symmetric):
    checkpoint, quantization = written(tmp_path, recipe(bits, group, symmetric))
    assert quantization["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors[f"{NAME}.scales"].dtype == torch.float16
    assert tensors[f"{NAME}.qweight"].shape == (64 * bits // 32, 64)
    expected = checkpoint.read(NAME)
    assert torch.equal(slow_weight(tensors, NAME, quantization), expected.dequantize())
    read = FORMAT.read(tmp_path).read(NAME)
    assert torch.equal(read.codes, expected.codes)
    assert not expected.dequantize()[~expected.mask].any()
    verify_tensors(FORMAT, checkpoint, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_of_16_bits_are_the_models_own(tmp_path, dtype):
    checkpoint, _ = written(tmp_path, recipe(4, 16), dtype)
    assert load_file(tmp_path / "model.safetensors")[f"{NAME}.scales"].dtype == dtype
    assert torch.equal(FORMAT.read(tmp_path).weight(NAME), checkpoint.weight(NAME))


def test_zero_points_at_both_ends_of_the_codes(tmp_path):
    """The lowest, of which v1 would store -1, and the highest."""
    checkpoint = compressed_checkpoint(
        tiny_model("llama", **WIDE), recipe(4, -1, symmetric=False), FORMAT
    )
    weights = {name: checkpoint.read(name) for name in checkpoint.contents.compressed}
    grid = weights[NAME].grid
    ends = torch.tensor([-8.0, 7.0]).repeat(32)[:, None]
    weights[NAME] = replace(weights[NAME], grid=replace(grid, zero_point=ends), mask=None)
    checkpoint = replace(checkpoint, read=weights.__getitem__)
    FORMAT.write(checkpoint, tmp_path)
    verify_tensors(FORMAT, checkpoint, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert torch.equal(slow_weight(tensors, NAME, config), weights[NAME].dequantize())


def test_settings_that_differ_are_named(tmp_path):
    model = tiny_model("llama", **WIDE)
    topology = open_model(model).topology
    special = {NAME: srcr.QuantSpec("rtn", 8, 16), "model.layers.1.self_attn.o_proj": None}
    layers = [
        LayerPlan(name, None, special.get(name, srcr.QuantSpec("rtn", 3, -1, False)))
        for name in topology.linears()
    ]
    checkpoint, quantization = written(tmp_path, CompressionPlan(tuple(layers)))
    assert quantization["bits"] == 3
    assert quantization["dynamic"] == {
        r"+:^model\.layers\.0\.mlp\.down_proj$": {"bits": 8, "group_size": 16, "sym": True},
        r"-:^model\.layers\.1\.self_attn\.o_proj$": {},
    }
    assert scheme_of(quantization, NAME) == Scheme(8, 16, True)
    assert FORMAT.read(tmp_path).contents.schemes == checkpoint.contents.schemes
    verify_tensors(FORMAT, checkpoint, tmp_path)
    assert "for GPTQModel" in FORMAT.notes(checkpoint.contents)[0]


def test_what_vllm_serves_is_said():
    opened = open_model(tiny_model("llama", **WIDE))

    def noted(scheme):
        return FORMAT.notes(Contents(opened.topology, opened.config, {NAME: scheme}, (NAME,)))

    assert noted(Scheme(4, 32, True)) == noted(Scheme(8, -1, True)) == []
    for scheme in (Scheme(4, 32, False), Scheme(3, 32, True), Scheme(4, 16, True)):
        assert "for GPTQModel" in noted(scheme)[0]


@pytest.mark.parametrize(
    ("name", "scheme", "message"),
    [
        (NAME, Scheme(5, -1, True), "has codes of 2, 3, 4 and 8 bits"),
        (NAME, Scheme(4, 8, True), "has groups of 8"),
        ("lm_head", Scheme(4, -1, True), "does not hold lm_head quantized"),
        (None, None, "quantizes none"),
    ],
)
def test_what_the_layout_does_not_hold(name, scheme, message):
    opened = open_model(tiny_model("llama", **WIDE))
    schemes = {} if name is None else {name: scheme}
    with pytest.raises(InputError, match=message):
        FORMAT.check(Contents(opened.topology, opened.config, schemes, tuple(schemes)))


@pytest.mark.parametrize(("bits", "fits"), [(4, True), (8, True), (3, False), (2, False)])
def test_shapes_that_do_not_fill_words(bits, fits):
    opened = open_model(tiny_model("llama", **WIDE | {"intermediate_size": 40}))
    contents = Contents(opened.topology, opened.config, {NAME: Scheme(bits, -1, True)}, (NAME,))
    if fits:
        FORMAT.check(contents)
        return
    with pytest.raises(InputError, match=r"does not divide the 64 x 40 of .*down_proj"):
        FORMAT.check(contents)


def test_scales_that_are_no_float16_are_refused(tmp_path):
    checkpoint = compressed_checkpoint(tiny_model("llama", **WIDE), recipe(4))
    with pytest.raises(InputError, match=r"compress the original model with --format gptq"):
        FORMAT.write(checkpoint, tmp_path)


def damaged(folder, **tensors):
    path = folder / "model.safetensors"
    given = load_file(path)
    save_file(given | {f"{NAME}.{key}": value for key, value in tensors.items()}, path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"g_idx": torch.arange(64, dtype=torch.int32) % 4}, "activation order"),
        ({"qzeros": torch.full((4, 8), -1, dtype=torch.int32)}, "zero-points that are no codes"),
        ({"qweight": torch.zeros(4, 64, dtype=torch.int32)}, "does not fit the model"),
    ],
)
def test_what_others_wrote_otherwise_is_refused(tmp_path, tensors, message):
    written(tmp_path, recipe(4, 16))
    damaged(tmp_path, **tensors)
    with pytest.raises(InputError, match=message):
        FORMAT.read(tmp_path).read(NAME)


def test_zero_points_stored_less_one_are_read(tmp_path):
    """As AutoGPTQ stores them: its asymmetric checkpoints are v1."""
    checkpoint, quantization = written(tmp_path, recipe(4, -1, symmetric=False))
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for name in checkpoint.contents.compressed:
        assert bool((checkpoint.read(name).grid.zero_point > -8).all())
        tensors[f"{name}.qzeros"] -= 0x11111111
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = quantization | {"checkpoint_format": "gptq"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    verify_tensors(FORMAT, checkpoint, tmp_path)


def test_compressed_inspected_loaded_and_exported(tmp_path):
    """The command's own path: bfloat16, so that every format keeps the scales as they are."""
    base = save_tiny_model(tmp_path / "base", "llama", torch.bfloat16, **WIDE)
    ids = torch.randint(3, 90, (4, 16))
    out, quiet = tmp_path / "out", srcr.RunOptions(quiet=True)
    text, output = srcr.Calibration(ids, 4, 16), srcr.Output(out, format="gptq")
    record = srcr.compress(base, output, recipe(4, 32), text, quiet)
    assert (record.format, record.rates.engine) == ("gptq", "gptqmodel")
    inspection = srcr.inspect(out)
    assert inspection.quantized
    assert inspection.parameters == srcr.inspect(base).parameters
    logits = srcr.load(out, torch.float32)(ids).logits
    codes = {
        name: detect(out).read(out).read(name).codes
        for name in ("model.layers.0.mlp.up_proj", NAME)
    }
    for fmt in ("compressed-tensors", "archive", "dense"):
        folder = tmp_path / fmt
        srcr.export(out, srcr.Output(folder, format=fmt), quiet)
        assert torch.equal(srcr.load(folder, torch.float32)(ids).logits, logits)
        if fmt != "dense":
            read = detect(folder).read(folder)
            assert all(torch.equal(read.read(name).codes, codes[name]) for name in codes)
    back = tmp_path / "back"
    srcr.export(tmp_path / "compressed-tensors", srcr.Output(back, format="gptq"), quiet)
    assert (back / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
