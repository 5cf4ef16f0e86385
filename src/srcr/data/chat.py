"""Rows of a data set as documents: plain text, or a chat for the tokenizer's template."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from srcr.errors import InputError

#: Who speaks in the ShareGPT form, as chat templates call them; other names stay as they are.
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
#: Fields of an instruction, and those that may hold the answer.
INSTRUCTIONS = (("instruction", ("output", "response")), ("prompt", ("completion", "response")))
#: All fields that are read.
FIELDS = ("text", "messages", "conversations", "instruction", "input", "output", "prompt", "completion",
          "response")  # fmt: skip
#: What a row may hold instead of a text, for error messages.
CHAT_FIELDS = (
    "'messages', 'conversations', 'instruction' and 'output', or 'prompt' and 'completion'"
)


@dataclass(frozen=True)
class Chat:
    """``messages``, each with a role and its content, and the ``place`` they come from, for people."""

    messages: tuple[dict[str, str], ...]
    place: str

    @property
    def text(self) -> str:
        """The contents alone, with blank lines between."""
        return "\n\n".join(message["content"] for message in self.messages)


Document = str | Chat


def as_chats(documents: Iterable[Document], chat: bool | None, place: str) -> Iterator[Document]:
    """The documents of a source at a ``place``; with ``chat`` each plain text as a user's message, with
    ``chat`` False each chat as plain text."""
    for document in documents:
        if chat is False and isinstance(document, Chat):
            yield document.text
        elif chat and isinstance(document, str):
            yield Chat(({"role": "user", "content": document},), place)
        else:
            yield document


def clean_text(value: str | None) -> str:
    """A text as UTF-8 can write it: nothing for a null, and U+FFFD for half a surrogate pair."""
    return (value or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def is_blank(document: Document) -> bool:
    """Whether there is nothing but white space in a document."""
    return not (document if isinstance(document, str) else document.text).strip()


def has_document(names: Sequence[str]) -> bool:
    """Whether rows with fields of these names hold a text or a chat."""
    if {"text", "messages", "conversations"} & set(names):
        return True
    return any(
        question in names and any(answer in names for answer in answers)
        for question, answers in INSTRUCTIONS
    )


def row_document(row: Mapping[str, Any], place: str) -> Document:
    """The document of a row with :func:`has_document`: its text, else its chat; empty for nulls.

    Raises:
        InputError: names the place, and the field that does not hold what it should.
    """
    if row.get("text") is not None:
        return value_document(row["text"], "text", place)
    for field in ("messages", "conversations"):
        if row.get(field):
            return value_document(row[field], field, place)
    for question, answers in INSTRUCTIONS:
        answer = next((name for name in answers if row.get(name) is not None), None)
        if row.get(question) is not None and answer is not None:
            asked = _turns(row[question], question, "user", place)
            if row.get("input"):  # Alpaca's: what the instruction is about
                asked += _turns(row["input"], "input", "user", place)
                asked = [{"role": "user", "content": "\n\n".join(m["content"] for m in asked)}]
            return Chat((*asked, *_turns(row[answer], answer, "assistant", place)), place)
    return ""


def value_document(value: Any, field: str, place: str) -> Document:
    """A string or a list of messages as a document.

    Raises:
        InputError: it is neither; a message without a role or a content.
    """
    if isinstance(value, str | None):
        return clean_text(value)
    if not isinstance(value, Sequence):
        what = "string" if field == "text" else "list of messages"
        raise InputError(f"{place} has no {what} field {field!r} (it holds {type(value).__name__})")
    return Chat(tuple(_message(each, field, place) for each in value), place)


def _turns(value: Any, field: str, role: str, place: str) -> list[dict[str, str]]:
    """A question or an answer as messages: a string, or messages already."""
    if isinstance(value, str):
        return [{"role": role, "content": clean_text(value)}]
    if not isinstance(value, Sequence):
        raise InputError(f"{place} has no string field {field!r} (it holds {type(value).__name__})")
    return [_message(each, field, place) for each in value]


def _message(value: Any, field: str, place: str) -> dict[str, str]:
    """A message in the form that templates take, from role and content or from ShareGPT's from and value."""
    if not isinstance(value, Mapping):
        raise InputError(
            f"{place}: {field!r} holds {type(value).__name__}, not messages with 'role' and 'content'"
        )
    role, content = value.get("role"), value.get("content")
    if role is None and "from" in value:
        role, content = value["from"], value.get("value")
        role = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    if isinstance(content, list | tuple):
        content = "".join(map(_part_text, content))
    if not isinstance(role, str) or not isinstance(content, str | None):
        keys = ", ".join(map(str, value)) or "nothing"
        raise InputError(
            f"{place}: a message of {field!r} has no string 'role' and 'content' (it has: {keys})"
        )
    return {"role": role, "content": clean_text(content)}


def _part_text(part: Any) -> str:
    """The text of a part of a message; nothing for images and the like."""
    text = part.get("text") if isinstance(part, Mapping) else part
    return text if isinstance(text, str) else ""
