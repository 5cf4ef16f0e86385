"""The public functions, as a program uses them: models, texts and token ids in memory."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import srcr
from srcr.data.tokens import Tokens
from srcr.errors import InputError
from srcr.testing import tiny_model

QUIET = srcr.RunOptions(quiet=True)
RECIPE = srcr.Recipe(srcr.PruneSpec(sparsity=0.25), srcr.QuantSpec(num_bits=4))
FUNCTIONS = (
    "compress", "evaluate", "export", "inspect", "load", "open_model", "plan", "preview_compression",
    "preview_recovery", "preview_search", "search", "sensitivity", "verify", "write_report",
)  # fmt: skip


@pytest.fixture(scope="module")
def stories():
    folder = Path(__file__).parents[2] / "shared/models/stories260K"
    if not folder.is_dir():
        pytest.skip("../shared/models/stories260K (a real model) is not here")
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def texts(tokenizer, n=40):
    words = tokenizer.decode(range(3, 400), skip_special_tokens=True).split()
    return [" ".join(words[i:] + words[:i]) for i in range(0, 5 * n, 5)]


def test_every_name_is_there_and_shown():
    for name in srcr.__all__:
        assert getattr(srcr, name) is not None
        assert name in dir(srcr)
    public = {name for names in srcr._HOMES.values() for name in names} | {"__version__"}
    assert public == set(srcr.__all__)
    for name in ("SrcrError", "InputError", "NumericalError", "VerificationError"):
        assert issubclass(getattr(srcr, name), srcr.SrcrError)


def test_what_editors_see_is_what_there_is():
    """The names that are imported for type checkers alone."""
    tree = ast.parse(Path(srcr.__file__).read_text())
    imports = next(node for node in tree.body if isinstance(node, ast.If)).body
    assert {node.module: tuple(sorted(alias.name for alias in node.names)) for node in imports} == {
        home: tuple(sorted(names)) for home, names in srcr._HOMES.items()
    }
    with pytest.raises(AttributeError, match="nothing"):
        srcr.nothing  # noqa: B018


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_few_typed_and_documented(name):
    function = getattr(srcr, name)
    assert callable(function)
    signature = inspect.signature(function)
    assert len(signature.parameters) <= 7
    assert all(p.annotation is not p.empty for p in signature.parameters.values())
    assert signature.return_annotation is not signature.empty
    assert function.__doc__
    assert ">>>" in function.__doc__, "no example"


def test_functions_stay_functions_whatever_is_imported():
    """A folder of the same name would take a function's place as soon as something of it is imported."""
    for _ in range(2):
        for name in FUNCTIONS:
            assert callable(getattr(srcr, name)), name


@pytest.mark.slow
def test_keywords_are_those_of_the_command_line_and_every_source_is_the_same(stories, tmp_path):
    """The same token ids as a tensor, a file, a path, lists and a DataLoader, padded or not."""
    ids = random_ids(n=6, length=24, vocabulary=500)
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    padded = [{key: torch.nn.functional.pad(row[key], (3, 0)) for key in row} for row in rows]
    sources = {
        "tensor": ids,
        "name": str(tmp_path / "ids.safetensors"),
        "path": tmp_path / "ids.safetensors",
        "lists": ids.tolist(),
        "loader": DataLoader(TensorDataset(ids), batch_size=4),
        "padded": DataLoader(padded, batch_size=4),
    }
    settings = {"sparsity": 0.25, "bits": 4, "quant_method": "rtn"}
    for name, source in sources.items():
        record = srcr.compress(
            stories, tmp_path / name, calibration=source, options=QUIET, **settings
        )
        assert (record.rates.sparsity, record.rates.bits) == (pytest.approx(0.25, abs=1e-3), 4)
    recipe = srcr.Recipe(srcr.PruneSpec(sparsity=0.25), srcr.QuantSpec("rtn"))
    srcr.compress(stories, tmp_path / "recipe", recipe, ids, QUIET)
    written = {
        (tmp_path / name / "model.safetensors").read_bytes() for name in (*sources, "recipe")
    }
    assert len(written) == 1


def test_settings_that_cannot_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refused(message, *args, **settings):
        with pytest.raises(srcr.InputError, match=message):
            srcr.compress("bundled", *args, **settings)

    refused("bitz", "out", bitz=4)
    refused("num_bits 9 is out of range", "out", bits=9)
    refused("plan decides bits", "out", RECIPE, bits=4)
    refused("second argument, the plan the third", RECIPE, "self", "out")
    refused("DataLoader holds no tensor", "out", calibration=DataLoader(["a", "b"]), options=QUIET)


@pytest.mark.slow
def test_a_model_in_memory_through_everything(stories, tmp_path):
    datasets = pytest.importorskip("datasets")
    model, tokenizer = stories
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    documents = texts(tokenizer)
    sources = {
        "texts": documents,
        "dataset": datasets.Dataset.from_dict({"text": documents}),
    }
    for name, source in sources.items():
        calibration = srcr.Calibration(source, samples=8, seq_len=64)
        record = srcr.compress(stories, tmp_path / name, RECIPE, calibration, QUIET)
        assert record.base == Path(model.name_or_path).name
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in sources]
    assert weights[0] == weights[1]
    ids = torch.tensor(tokenizer(" ".join(documents))["input_ids"][: 16 * 64]).view(16, 64)
    srcr.compress(model, tmp_path / "ids", RECIPE, ids, QUIET)
    assert (tmp_path / "texts" / "tokenizer.json").is_file()
    small = srcr.load(tmp_path / "texts")
    evaluations = srcr.evaluate(
        stories, [tmp_path / "texts", (small, tokenizer)], ids, options=QUIET
    )
    assert evaluations[0].divergence == evaluations[1].divergence
    assert evaluations[0].divergence.kl.value > 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), "the model was changed"


@pytest.mark.slow
def test_a_model_in_memory_gives_what_its_folder_gives(stories, tmp_path):
    model, tokenizer = stories
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    ids = torch.randint(3, 500, (8, 64), generator=torch.Generator().manual_seed(0))
    for name, base in (("memory", stories), ("folder", tmp_path / "base")):
        srcr.compress(base, tmp_path / name, RECIPE, ids, QUIET)
    weights = [
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("memory", "folder")
    ]
    assert weights[0] == weights[1]


def random_ids(n=4, length=16, vocabulary=90):
    return torch.randint(3, vocabulary, (n, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_a_model_that_was_cast_is_taken_as_it_will_be_loaded(cast, tmp_path):
    """``model.bfloat16()`` rounds RoPE's frequencies too; no checkpoint holds them."""
    model = getattr(tiny_model("llama"), cast)()
    rounded = model.model.rotary_emb.inv_freq
    srcr.compress(model, tmp_path / "out", RECIPE, random_ids(), QUIET)
    assert model.model.rotary_emb.inv_freq is rounded
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    (same,) = srcr.evaluate(folder, [model], random_ids(), options=QUIET)
    assert same.divergence.kl.value == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("opened_first", [True, False])
def test_a_model_in_training_is_taken_without_dropout_and_stays_in_training(opened_first, tmp_path):
    model = tiny_model("gpt2")
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    model.config.resid_pdrop = 0.5
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    given = srcr.open_model(model) if opened_first else model
    model.train()
    srcr.compress(given, tmp_path / "memory", RECIPE, random_ids(), QUIET)
    srcr.compress(folder, tmp_path / "folder", RECIPE, random_ids(), QUIET)
    assert all(module.training for module in model.modules())
    written = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("memory", "folder")]
    assert written[0] == written[1]


def test_generation_settings_that_transformers_would_not_save_are_written(tmp_path):
    model = tiny_model("llama")
    model.generation_config.temperature, model.generation_config.do_sample = 0.7, False
    srcr.compress(model, tmp_path / "out", RECIPE, random_ids(), QUIET)
    assert srcr.load(tmp_path / "out").generation_config.temperature == 0.7


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.full((4, 16), 10**6), "outside the model's vocabulary"),
        (torch.arange(16), r"must be int64 \[n, len\]"),
        (torch.zeros(4, 1, dtype=torch.long), "too little to predict"),
        (torch.ones(2, 10**4, dtype=torch.long), "longer than the model's context"),
    ],
)
def test_token_ids_that_the_model_cannot_be_given(ids, message, tmp_path):
    model, tokens = tiny_model("llama"), Tokens.of(ids)
    with pytest.raises(InputError, match=message):
        srcr.compress(model, tmp_path / "out", RECIPE, tokens, QUIET)
    with pytest.raises(InputError, match=message):
        srcr.evaluate(model, [model], tokens, options=QUIET)


def test_a_single_sequence_gives_no_interval():
    model = tiny_model("llama")
    with pytest.raises(InputError, match="gives no interval"):
        srcr.evaluate(model, [model], Tokens.of(random_ids(1)), options=QUIET)


def test_float64_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(InputError, match="float64: convert them to float32"):
        srcr.compress(tiny_model("llama").double(), tmp_path / "out", RECIPE, random_ids(), QUIET)


def test_the_output_is_checked_before_the_model_is_opened(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "out").mkdir()
    model, out = tmp_path / "model", tmp_path / "out"  # an empty folder, which is no model
    with pytest.raises(InputError, match="exists: choose another name"):
        srcr.compress(model, out, RECIPE, "self", QUIET)
    with pytest.raises(InputError, match="is or holds the model itself"):
        srcr.compress((model, None), model, RECIPE, "self", QUIET)
    with pytest.raises(InputError, match="exists: choose another name"):
        srcr.search(model, srcr.Target(tcr=0.8), None, "self", out)
