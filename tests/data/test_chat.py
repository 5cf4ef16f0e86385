"""Rows of data sets as texts and chats."""

import pytest

from srcr.data.chat import Chat, has_document, is_blank, row_document, value_document
from srcr.errors import InputError

ASKED = {"role": "user", "content": "Why?"}
ANSWERED = {"role": "assistant", "content": "Because."}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [ASKED, ANSWERED], "id": 3}, (ASKED, ANSWERED)),
        ({"messages": [{**ASKED, "name": None}]}, (ASKED,)),
        ({"conversations": [ASKED, ANSWERED]}, (ASKED, ANSWERED)),
        (
            {"conversations": [
                {"from": "system", "value": "Be brief."}, {"from": "human", "value": "Why?"},
                {"from": "gpt", "value": "Because."},
            ]},
            (SYSTEM, ASKED, ANSWERED),
        ),
        ({"instruction": "Why?", "output": "Because."}, (ASKED, ANSWERED)),
        ({"instruction": "Why?", "input": "", "output": "Because."}, (ASKED, ANSWERED)),
        ({"instruction": "Why?", "input": None, "response": "Because."}, (ASKED, ANSWERED)),
        (
            {"instruction": "Why?", "input": "It rains.", "output": "Because."},
            ({"role": "user", "content": "Why?\n\nIt rains."}, ANSWERED),
        ),
        ({"prompt": "Why?", "completion": "Because."}, (ASKED, ANSWERED)),
        ({"prompt": "Why?", "response": "Because."}, (ASKED, ANSWERED)),
        ({"prompt": [SYSTEM, ASKED], "completion": [ANSWERED]}, (SYSTEM, ASKED, ANSWERED)),
        ({"text": None, "messages": [ASKED]}, (ASKED,)),
        (
            {"messages": [{"role": "user", "content": [
                {"type": "image"}, {"type": "text", "text": "Wh"}, "y?",
            ]}]},
            (ASKED,),
        ),
        ({"messages": [ASKED, {"role": "assistant", "content": None}]},
         (ASKED, {"role": "assistant", "content": ""})),
        ({"messages": [{"role": "user", "content": "a\ud83d"}]},
         ({"role": "user", "content": "a\ufffd"},)),
    ],
)  # fmt: skip
def test_rows_that_are_chats(row, messages):
    assert has_document(list(row))
    assert row_document(row, "row 3") == Chat(messages, "row 3")


def test_a_text_comes_first():
    assert row_document({"text": "a", "messages": [ASKED]}, "row 3") == "a"


@pytest.mark.parametrize(
    "row",
    [
        {"text": None}, {"messages": None}, {"messages": []}, {"instruction": "Why?", "output": None},
        {"prompt": None, "completion": "a"}, {"text": " "},
        {"messages": [{"role": "user", "content": " "}]},
    ],
)  # fmt: skip
def test_rows_with_nothing_in_them(row):
    assert has_document(list(row))
    assert is_blank(row_document(row, "row 3"))


@pytest.mark.parametrize("names", [[], ["body"], ["prompt"], ["instruction", "completion"]])
def test_rows_that_hold_neither(names):
    assert not has_document(names)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "Why?\n"}, None),
        ({"messages": 3}, r"has no list of messages field 'messages' \(it holds int\)"),
        ({"messages": ["Why?"]}, "'messages' holds str, not messages with 'role' and 'content'"),
        ({"messages": [{"content": "Why?"}]}, r"'messages' has no string 'role'.*it has: content"),
        ({"messages": [{"role": 3, "content": "Why?"}]}, "has no string 'role' and 'content'"),
        ({"messages": [{"role": "user", "content": 3}]}, "has no string 'role' and 'content'"),
        ({"messages": [{}]}, r"it has: nothing"),
        ({"conversations": [{"from": 3, "value": "a"}]}, "'conversations' has no string 'role'"),
        ({"instruction": 3, "output": "a"}, r"no string field 'instruction' \(it holds int\)"),
        ({"prompt": "Why?", "completion": 3}, "no string field 'completion'"),
        ({"text": 3}, r"no string field 'text' \(it holds int\)"),
    ],
)
def test_rows_that_do_not_hold_what_they_should(row, message):
    if message is None:  # a string is a text, whatever its field
        assert row_document(row, "row 3") == row["messages"]
        return
    with pytest.raises(InputError, match=rf"^row 3.*{message}"):
        row_document(row, "row 3")


def test_a_column_may_hold_strings_or_messages():
    assert value_document("a", "body", "row 3") == "a"
    assert value_document(None, "body", "row 3") == ""
    assert value_document([ASKED], "body", "row 3") == Chat((ASKED,), "row 3")
