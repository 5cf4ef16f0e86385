"""The model card's evaluation part."""

from dataclasses import replace

import pytest
import yaml

from srcr.plans.plan import CompressionPlan
from srcr.records.base_card import BaseCard, read_base_card
from srcr.records.card import label, labels, model_card, with_evaluation
from srcr.records.evaluation import Evaluation
from srcr.records.run import Rates, RunRecord
from srcr.records.text import TextRecord
from srcr.serialize import from_dict

CARD = "# x\n<!-- evaluation -->\nnot yet\n<!-- end of evaluation -->\nrest"
DATA = {
    "base": "a", "compressed": "b",
    "rates": {"sparsity": 0.25, "bits": 4, "tcr": 0.8, "zeros": 0.3, "base_bytes": 9, "stored_bytes": 4,
              "loaded_bytes": 4, "engine": "vllm", "source": "srcr.json"},
    "divergence": {
        "n_tokens": 28,
        "kl": {"value": 0.1, "ci95": [0.09, 0.11], "p50": 0.01, "p95": 0.2, "p99": 0.4, "p999": 1.0},
        "top1_agreement": {"value": 0.9, "ci95": [0.89, 0.91]},
        "flips": {"value": 0.05, "ci95": [0.04, 0.06]},
        "perplexity": {"base": 2.0, "compressed": 2.2, "ratio": {"value": 1.1, "ci95": [1.0, 1.2]}},
    },
    "semantic": {"consistency": 1.0, "ci95": [1.0, 1.0], "scorer": "base", "chance": 1.0, "n": 4,
                 "normalised": None, "normalised_ci95": None},
    "tasks": {
        "a": {"base": 0.9, "compressed": 0.8, "chance": 0.25, "retention": 0.85, "ci95": [0.8, 0.9],
              "p_value": 0.01, "n": 9},
        "b": {"base": 0.25, "compressed": 0.3, "chance": 0.25, "retention": None, "ci95": None,
              "p_value": 1.0, "n": 9},
    },
    "sr": 0.85, "sr_ci95": [0.8, 0.9], "srcr": 0.6, "srcr_ci95": [0.5, 0.7],
    "text": {"source": "self", "samples": 4, "seq_len": 8, "sha256": "00"}, "command": "srcr evaluate a b",
}  # fmt: skip
EVALUATION = from_dict(Evaluation, DATA)


def test_what_is_undefined_is_said():
    card = with_evaluation(CARD, EVALUATION)
    assert "all continuations are alike" in card
    assert "b: retention | undefined" in card
    assert "not yet" not in card
    assert card.startswith("# x")
    assert card.endswith("rest")
    assert with_evaluation(card, EVALUATION) == card


def test_a_card_of_another_hand_stays_as_it_is():
    assert with_evaluation("# my own card", EVALUATION) == "# my own card"


def test_labels(tmp_path, monkeypatch):
    for name in ("a/small", "b/small", "large"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "large")
    assert label(".") == "large"
    assert label("org/model") == "org/model"
    same = [str(tmp_path / name) for name in ("a/small", "b/small")]
    assert labels([*same, "."]) == [*same, "large"]


RATES = Rates(0.25, 4.0, 0.8125, 0.3, 9, 4, 4, "vllm", "srcr.json")


def record(base, **settings):
    """A record of a compression."""
    values = {
        "base": str(base), "base_sha256": "00", "command": "srcr compress `x`", "format": "dense",
        "rates": RATES, "plan_fingerprint": "11", "calibration": TextRecord("a|b\n#c", 2, 8, "00"),
        "layers": (), "versions": {}, "seconds": 1.0, "peak_memory_bytes": 1,
    } | settings  # fmt: skip
    return RunRecord(**values)


def metadata_of(card):
    return yaml.safe_load(card.split("---\n", 2)[1])


def header(base):
    """The card's metadata, and the line of its title."""
    card = model_card(record(base), CompressionPlan(()))
    assert "a\\|b \\#c" in card
    _, metadata, text = card.split("---\n", 2)
    return yaml.safe_load(metadata), next(line for line in text.splitlines() if line.strip())


@pytest.mark.parametrize(
    ("base", "model"),
    [
        ("org/name", "org/name"),
        ("Org-1/Name_2.5-3B", "Org-1/Name_2.5-3B"),
        ("models--org--name/snapshots/0123456789abcdef0123456789abcdef01234567", "org/name"),
        ("/cache/models--org--name/snapshots/0123456789abcdef/", "org/name"),
        ("bundled", None),
        ("/data/my model", None),
        ("./a/b", None),
        ("a/b/c", None),
        ("org/na me", None),
        ("org/na--me", None),
        ("org/-name", None),
        ("org/name.git", None),
    ],
)
def test_only_a_name_on_the_hub_is_a_base_model(base, model):
    metadata, _ = header(base)
    assert metadata.get("base_model") == model
    assert metadata["tags"] == ["srcr", "pruning", "quantization"]


@pytest.mark.parametrize(
    "name",
    ["step: 1000", "a\nb", '"quoted"', "# x", "my: model #1", "- x", "[x](y)", "<script>", "*x*", "ü",
     "{a: 1}"],
)  # fmt: skip
def test_any_name_of_a_folder(name, tmp_path):
    (tmp_path / name).mkdir()
    metadata, title = header(tmp_path / name)
    assert "base_model" not in metadata
    assert title.startswith("# ")
    assert title.endswith(", compressed by srcr")
    assert "<script>" not in title


def test_a_local_folder_with_the_form_of_an_id(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in header("org/name")[0]


def test_what_the_original_says_holds_for_it_too():
    base_card = BaseCard("other", "a-licence", "LICENSE", ("en", "fr"))
    metadata = metadata_of(model_card(record("org/name", base_card=base_card), CompressionPlan(())))
    assert metadata["license"] == "other"
    assert metadata["license_name"] == "a-licence"
    assert metadata["license_link"] == "LICENSE"
    assert metadata["language"] == ["en", "fr"]
    assert metadata["base_model"] == "org/name"
    assert metadata["base_model_relation"] == "quantized"


@pytest.mark.parametrize(
    ("text", "card"),
    [
        ("---\nlicense: mit\nlanguage: en\n---\n# x", BaseCard("mit", language=("en",))),
        ("---\nlicense: [1, 2]\nlanguage: [en, 3]\n---\n", BaseCard(language=("en",))),
        ("---\n{broken\n---\n", None),
        ("---\n- a\n---\n", None),
        ("---\nlicense: mit", BaseCard("mit")),
        ("# no metadata", None),
        ("\x00\xff", None),
        (None, None),
    ],
)
def test_cards_of_originals(text, card, tmp_path):
    if text is not None:
        (tmp_path / "README.md").write_bytes(text.encode("latin-1"))
    assert read_base_card(tmp_path) == card


def test_pruned_alone_is_not_quantized():
    rates = replace(RATES, bits=16.0)
    metadata = metadata_of(model_card(record("org/name", rates=rates), CompressionPlan(())))
    assert "base_model_relation" not in metadata
    assert metadata["tags"] == ["srcr", "pruning"]


@pytest.mark.parametrize(
    ("base", "command"),
    [
        ("bundled", "srcr evaluate bundled THIS --tasks bundled --semantic --report"),
        ("org/name", "srcr evaluate org/name THIS --semantic --report"),
        ("/data/model", "srcr evaluate BASE THIS --semantic --report"),
    ],
)
def test_the_next_step_fits_the_model(base, command):
    assert f"`{command}`" in model_card(record(base), CompressionPlan(()))


@pytest.mark.parametrize(
    ("settings", "shown", "not_shown"),
    [
        ({"format": "compressed-tensors"}, ("from_pretrained", "vllm serve"), ("srcr.load",)),
        ({"format": "gguf", "loader": "srcr"}, ("llama-cli -m",), ("vllm serve",)),
        ({"format": "archive", "loader": "srcr"}, ("srcr export",), ("vllm serve",)),
        (
            {"format": "gptq", "loader": "srcr"},
            ("GPTQModel.load(",),
            ("vllm serve", "packed embeddings"),
        ),
        ({"format": "compressed-tensors", "loader": "srcr"}, ("srcr.load",), ("vllm serve",)),
        (
            {"format": "compressed-tensors", "rates": replace(RATES, engine="transformers")},
            ("from_pretrained",),
            ("vllm serve",),
        ),
    ],
)
def test_how_it_is_used(settings, shown, not_shown):
    card = model_card(record("bundled", **settings), CompressionPlan(()))
    assert all(text in card for text in shown)
    assert not any(text in card for text in not_shown)


def test_results_in_the_metadata():
    before = model_card(record("org/name", format="gguf"), CompressionPlan(()))
    card = with_evaluation(before, EVALUATION)
    metadata = metadata_of(card)
    assert {k: v for k, v in metadata.items() if k != "model-index"} == metadata_of(before)
    (index,) = metadata["model-index"]
    values = {
        (each["dataset"]["name"], metric["type"]): metric["value"]
        for each in index["results"]
        for metric in each["metrics"]
    }
    assert values == {("a", "accuracy"): 0.8, ("b", "accuracy"): 0.3, ("self", "kl"): 0.1,
                      ("self", "perplexity"): 2.2}  # fmt: skip
    assert "Not measured yet" not in card
    assert with_evaluation(card, EVALUATION) == card


def test_metadata_that_somebody_broke_stay():
    card = "---\n{broken\n---\n" + CARD
    filled = with_evaluation(card, EVALUATION)
    assert filled.startswith("---\n{broken\n---\n# x")
    assert "KL to the base" in filled


def test_no_place_of_the_machine():
    evaluation = replace(
        EVALUATION, base="/home/me/a", compressed="/home/me/b",
        text=replace(EVALUATION.text, source="/home/me/t.txt"), command="srcr evaluate /home/me/a b",
    )  # fmt: skip
    text = TextRecord("/home/me/c.txt", 2, 8, "00")
    command = "srcr compress /home/me/a -o /home/me/b"
    card = model_card(record("/home/me/a", calibration=text, command=command), CompressionPlan(()))
    card = with_evaluation(card, evaluation)
    assert "/home" not in card
    assert "srcr compress a -o b" in card
    assert "t.txt" in card
