"""Models that lose whole structures: what stock transformers loads, and what is refused by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from srcr.errors import InputError
from srcr.models.checkpoint import open_model
from srcr.pipelines import structures
from srcr.pipelines.compress import compress
from srcr.pipelines.options import Output, RunOptions
from srcr.plans.plan import Recipe, read_plan
from srcr.plans.specs import PruneSpec, QuantSpec
from srcr.plans.structures import StructureSpec
from srcr.testing import save_tiny_model

pytestmark = pytest.mark.slow

QUIET = RunOptions(quiet=True)
IDS = (torch.arange(48).view(2, 24) * 7 + 3) % 96


def token_ids(path):
    """A file of token ids for the tiny models."""
    generator = torch.Generator().manual_seed(0)
    save_file({"input_ids": torch.randint(0, 96, (16, 32), generator=generator)}, path)
    return str(path)


@pytest.fixture
def text(tmp_path):
    return token_ids(tmp_path / "ids.safetensors")


def remove(folder, text, out, quant=None, prune=None, options=QUIET, **amounts):
    recipe = Recipe(prune, quant, structures=StructureSpec(**amounts))
    return compress(str(folder), Output(out), recipe, text, options)


@torch.no_grad()
def logits(folder):
    """By transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, model(IDS).logits


@pytest.mark.parametrize(
    "family",
    ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "opt", "gpt_neox", "gpt2"],
)
def test_channels_go_in_every_family(family, tmp_path, text):
    base = save_tiny_model(tmp_path / family, family)
    record = remove(base, text, tmp_path / "small", channels=0.34)
    model, _ = logits(tmp_path / "small")
    opened = open_model(str(tmp_path / "small"))
    widths = {c.size for c in opened.topology.couplings if c.kind == "channels"}
    before, after = (128, 96) if family == "gpt2" else (48, 32)
    assert widths == {after}
    assert record.verification.difference < 1e-3
    (structure,) = record.structures
    assert (structure.kind, structure.before, structure.after) == ("channels", before, after)
    total = sum(rows * cols for rows, cols in open_model(str(base)).topology.shapes.values())
    left = sum(rows * cols for rows, cols in opened.topology.shapes.values())
    assert record.rates.sparsity == pytest.approx(1 - left / total)
    assert record.rates.tcr == pytest.approx(1 - left / total)
    assert record.rates.stored_bytes < record.rates.base_bytes
    assert model.num_parameters() < AutoModelForCausalLM.from_pretrained(base).num_parameters()


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"]
)
def test_heads_and_layers_go_too(family, tmp_path, text):
    base = save_tiny_model(tmp_path / family, family, num_hidden_layers=3)
    record = remove(base, text, tmp_path / "small", heads=0.5, layers=1, channels=16)
    model, _ = logits(tmp_path / "small")
    config = model.config
    assert (config.num_hidden_layers, config.num_key_value_heads) == (2, 1)
    assert (config.num_attention_heads, config.head_dim) == (2, 8)
    assert config.intermediate_size == 32
    assert [each.kind for each in record.structures] == ["layers", "heads", "channels"]
    if getattr(config, "layer_types", None):
        assert len(config.layer_types) == 2
    assert record.verification.difference < 1e-3


@pytest.mark.parametrize("family", ["opt", "gpt_neox", "gpt2"])
def test_heads_that_a_config_cannot_say_are_refused_by_name(family, tmp_path, text):
    base = save_tiny_model(tmp_path / family, family)
    with pytest.raises(InputError, match="leave heads"):
        remove(base, text, tmp_path / "small", heads=1)
    assert not (tmp_path / "small").exists()
    assert not (tmp_path / "small.partial").exists()


def test_what_is_left_is_pruned_and_quantized(tmp_path, text):
    base = save_tiny_model(tmp_path / "llama", "llama")
    record = remove(
        base,
        text,
        tmp_path / "small",
        QuantSpec(num_bits=4, group_size=16),
        PruneSpec(sparsity=0.25),
        channels=0.34,
    )
    assert record.format == "compressed-tensors"
    model, _ = logits(tmp_path / "small")
    assert model.config.intermediate_size == 32
    removed = 1 - record.rates.sparsity
    left = (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 32) / (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)
    assert removed == pytest.approx(0.75 * left, abs=1e-3)
    assert record.rates.tcr == pytest.approx(1 - left * 0.75 * 4 / 16, abs=1e-3)


def test_the_plan_of_a_run_says_what_went_and_gives_the_same_again(tmp_path, text):
    base = save_tiny_model(tmp_path / "llama", "llama", num_hidden_layers=3)
    remove(base, text, tmp_path / "one", QuantSpec(group_size=-1), channels=0.34, layers=1)
    plan = read_plan(tmp_path / "one" / "plan.yaml")
    assert plan.structures == StructureSpec(channels=16, layers=1)
    compress(str(base), Output(tmp_path / "two"), plan, text, QUIET)
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "two"))
    assert one == two


#: What the runs that are killed remove.
EVERYTHING = Recipe(
    None,
    QuantSpec(group_size=-1),
    structures=StructureSpec(channels=0.34, heads=1, layers=1),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model, a text, and what a run leaves that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    base = save_tiny_model(folder / "llama", "llama", num_hidden_layers=3)
    text = token_ids(folder / "ids.safetensors")
    compress(str(base), Output(folder / "out"), EVERYTHING, text, QUIET)
    return base, text, folder / "out"


@pytest.mark.parametrize("where", ["depth", "width", "sweep"])
def test_a_killed_run_resumes_to_the_same_bytes(where, whole, tmp_path, monkeypatch):
    base, text, expected = whole
    out = tmp_path / "killed"
    with monkeypatch.context() as patch:
        stop_after(patch, where)
        with pytest.raises(KeyboardInterrupt, match="--resume"):
            compress(str(base), Output(out), EVERYTHING, text, QUIET)
    compress(str(base), Output(out, resume=True), EVERYTHING, text, QUIET)
    for name in ("model.safetensors", "config.json", "plan.yaml"):
        assert (out / name).read_bytes() == (expected / name).read_bytes()
    assert not [path for path in out.iterdir() if path.is_dir()]


def stop_after(patch, where):
    """Interrupt the run in the middle of a stage."""
    journal = structures.Journal
    add, seen = journal.add, []

    def stopping(self, tensors, **entry):
        path = add(self, tensors, **entry)
        stage = {"structures-depth": "depth", "structures-width": "width"}.get(
            self.folder.name, "sweep"
        )
        seen.append(stage)
        if stage == where and seen.count(stage) == (1 if where == "depth" else 2):
            raise KeyboardInterrupt
        return path

    patch.setattr(journal, "add", stopping)


def test_dead_channels_go_first_and_change_nothing(tmp_path, text):
    """Channels whose gate is 0 are never seen by the down projection."""
    folder = save_tiny_model(tmp_path / "llama", "llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    dead = [1, 5, 7, 8, 20, 21, 30, 31, 32, 33, 34, 40, 41, 45, 46, 47]
    for layer in model.model.layers:
        layer.mlp.gate_proj.weight.data[dead] = 0
    model.save_pretrained(folder)
    remove(folder, text, tmp_path / "small", channels=len(dead))
    expected, actual = logits(folder)[1], logits(tmp_path / "small")[1]
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("channels=1.5", "a share above 0"),
        ("rows=0.5", "use channels, heads, layers"),
        ("layers=2", "at least one must go and one stay"),
        ("heads=0.1", "at least one must go and one stay"),
    ],
)
def test_bad_amounts_end_before_any_work(argument, message, tmp_path, text, srcr):
    base = save_tiny_model(tmp_path / "llama", "llama")
    result = srcr(
        "compress", base, "-o", tmp_path / "small", "--remove", argument, "--calibration", text
    )
    assert result.code == 2
    assert message in result.error()
    assert not (tmp_path / "small").exists()


def test_the_command_says_what_is_left(tmp_path, text, srcr):
    base = save_tiny_model(tmp_path / "llama", "llama")
    out = tmp_path / "small"
    command = ["compress", base, "-o", out, "--calibration", text, "--json"]
    result = srcr(*command, "--remove", "channels=0.34,heads=1", "--bits", "8")
    assert result.code == 0, result.err
    assert "1 of 2 key-value heads, 32 of 48 feed-forward channels are left" in " ".join(
        result.err.split()
    )
    data = json.loads(result.out)
    assert [each["kind"] for each in data["structures"]] == ["heads", "channels"]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "32 of 48 feed-forward channels" in card
    evaluation = srcr("evaluate", base, out, "--text", text, "--speed", "--json")
    assert evaluation.code == 0, evaluation.err
    assert evaluation.json()["rates"]["tcr"] == pytest.approx(data["rates"]["tcr"])
    assert evaluation.json()["speed"]["decode"]["ratio"]["value"] > 0
    table = srcr("evaluate", base, out, "--text", text, "--speed")
    assert "tokens a second in transformers" in " ".join(table.out.split())
    shutil.rmtree(out)


def test_a_plan_decides_what_goes(tmp_path, text, srcr):
    plan = tmp_path / "plan.yaml"
    plan.write_text("structures: {channels: 0.34}\nquant: {num_bits: 8}\n", encoding="utf-8")
    base = save_tiny_model(tmp_path / "llama", "llama")
    command = ["compress", base, "-o", tmp_path / "small", "--calibration", text, "--plan", plan]
    refused = srcr(*command, "--remove", "channels=0.1")
    assert refused.code == 2
    assert "--plan decides remove" in refused.error()
    assert srcr(*command).code == 0
    assert json.loads((tmp_path / "small" / "config.json").read_text())["intermediate_size"] == 32
