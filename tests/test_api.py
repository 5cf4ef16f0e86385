"""The public functions, as a program uses them: models, texts and token ids in memory."""

import inspect

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import srcr

QUIET = srcr.RunOptions(quiet=True)
RECIPE = srcr.Recipe(srcr.PruneSpec(sparsity=0.25), srcr.QuantSpec(num_bits=4))
FUNCTIONS = ("compress", "evaluate", "export", "inspect", "load", "open_model", "plan", "search",
             "sensitivity", "write_report")  # fmt: skip


@pytest.fixture(scope="module")
def stories():
    from pathlib import Path

    folder = Path(__file__).parents[2] / "shared/models/stories260K"
    if not folder.is_dir():
        pytest.skip("../shared/models/stories260K (a real model) is not here")
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def texts(tokenizer, n=40):
    words = tokenizer.decode(range(3, 400), skip_special_tokens=True).split()
    return [" ".join(words[i:] + words[:i]) for i in range(0, 5 * n, 5)]


def test_every_name_is_there():
    for name in srcr.__all__:
        assert getattr(srcr, name) is not None
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
        record = srcr.compress(stories, RECIPE, calibration, tmp_path / name, QUIET)
        assert record.base == "LlamaForCausalLM" or "stories" in record.base
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in sources]
    assert weights[0] == weights[1]
    ids = torch.tensor(tokenizer(" ".join(documents))["input_ids"][: 16 * 64]).view(16, 64)
    srcr.compress(model, RECIPE, ids, tmp_path / "ids", QUIET)
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
        srcr.compress(base, RECIPE, ids, tmp_path / name, QUIET)
    weights = [
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("memory", "folder")
    ]
    assert weights[0] == weights[1]
