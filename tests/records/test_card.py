"""The model card's evaluation part."""

from srcr.records.card import label, labels, with_evaluation
from srcr.records.evaluation import Evaluation
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
