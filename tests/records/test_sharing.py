"""Records without the places of a machine."""

import pytest

from srcr.records.evaluation import Comparison, Semantic
from srcr.records.sharing import shareable

CACHE = "/root/.cache/huggingface/hub/models--org--name/snapshots/0123456789abcdef"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/data/my models/x", "x"),
        ("C:\\Users\\me\\x", "x"),
        (CACHE, "org/name"),
        ("models/x", "models/x"),
        ("../x", "../x"),
        ("org/name", "org/name"),
        ("~/x", "~/x"),
        ("hf:/data/set:config:train", "hf:set:config:train"),
        ("of /data/a.txt and (/data/b.txt)", "of a.txt and (b.txt)"),
        ("kept in '/data/my place/x', 3 files", "kept in 'x', 3 files"),
        ("KL 0.1 / 0.2, and/or 1/2", "KL 0.1 / 0.2, and/or 1/2"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("postgresql+psycopg://me:secret@host/db", "postgresql+psycopg://host/db"),
        ("sqlite:////data/trials.db", "sqlite:///trials.db"),
        ("re:.*mlp.*", "re:.*mlp.*"),
        ("/", "/"),
    ],
)
def test_texts(text, expected):
    assert shareable(text) == expected
    assert shareable({"a": [text]}) == {"a": [expected]}


def test_commands_word_by_word():
    command = (
        "srcr compress '/data/my models/x' -o small --config=/etc/run.yaml --calibration a.txt"
    )
    assert shareable({"command": command}) == {
        "command": "srcr compress x -o small --config=run.yaml --calibration a.txt"
    }
    secret = "srcr search bundled --storage postgresql://me:pw@host/db"
    assert "pw" not in shareable({"command": secret})["command"]
    assert shareable({"command": "srcr 'unclosed /data/x"})["command"] == "srcr 'unclosed x"


def test_what_models_wrote_stays():
    worst = (Comparison("cat /etc/passwd", "/bin/sh", "/bin/ls", 0.5),)
    semantic = Semantic(1.0, None, 0.1, 1.0, None, "/data/scorer", 1, worst=worst)
    shared = shareable(semantic)
    assert shared.worst == worst
    assert shared.scorer == "scorer"
