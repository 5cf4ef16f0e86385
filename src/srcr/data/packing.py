"""Documents become rows of token ids that each begin as the model expects."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from srcr.data.chat import Chat, Document
from srcr.errors import InputError, first_line

#: Text to see what a tokenizer puts around it.
PROBE = "The text."


@dataclass(frozen=True)
class SpecialTokens:
    """What a tokenizer puts before a text (``prefix``, mostly BOS) and behind it (``suffix``); and ``eos``,
    which separates texts where it adds neither, as models such as GPT-2 were trained."""

    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    eos: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any) -> "SpecialTokens":
        """Those of a tokenizer: the difference between a text with and without them."""
        whole: list[int] = tokenizer(PROBE, verbose=False)["input_ids"]
        plain = _plain_ids(tokenizer, PROBE)
        eos = tokenizer.eos_token_id
        end = (eos,) if isinstance(eos, int) else ()
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return cls(tuple(whole[:start]), tuple(whole[start + len(plain) :]), end)
        # A word may be cut otherwise behind a special token: then only these tell the text from the rest.
        special = set(tokenizer.all_special_ids)
        prefix = tuple(takewhile(special.__contains__, whole))
        suffix = tuple(takewhile(special.__contains__, reversed(whole[len(prefix) :])))[::-1]
        return cls(prefix, suffix, end)

    def between(self, before: Document, after: Document) -> tuple[int, ...]:
        """What separates two documents; a chat has its own special tokens, by its template."""
        end = () if isinstance(before, Chat) else self.suffix
        begin = () if isinstance(after, Chat) else self.prefix
        if not self.prefix and not self.suffix and not isinstance(before, Chat):
            return self.eos
        return end + begin


@dataclass(frozen=True)
class TokenStream:
    """Documents as one row of token ids, what separates them included; whether the messages of chats were
    ``joined`` to plain text, since the tokenizer has no template."""

    ids: list[int]
    joined: bool


def tokenize(
    documents: Iterable[Document], tokenizer: Any, special: SpecialTokens, enough: int
) -> TokenStream:
    """The documents in their order, up to the first that makes them ``enough`` tokens.

    Raises:
        InputError: the chat template refuses a chat.
    """
    stream: list[int] = []
    before: Document | None = None
    joined = False
    template = bool(getattr(tokenizer, "chat_template", None))
    for document in documents:
        if isinstance(document, Chat) and not template:
            document, joined = document.text, True
        ids = (
            _chat_ids(tokenizer, document)
            if isinstance(document, Chat)
            else _plain_ids(tokenizer, document)
        )
        if not ids:
            continue
        if before is not None:
            stream.extend(special.between(before, document))
        stream.extend(ids)
        before = document
        if len(stream) >= enough:
            break
    return TokenStream(stream, joined)


def cut_rows(stream: Sequence[int], prefix: tuple[int, ...], length: int) -> list[list[int]]:
    """The stream in rows of ``length`` tokens, of which the last may be shorter. Each begins with the prefix,
    which is put in front of what the stream goes on with, unless that begins with it anyway.

    Raises:
        InputError: the prefix fills a row.
    """
    if len(prefix) >= length:
        raise InputError(
            f"sequences of {length} tokens are too short: each begins with {len(prefix)} that the tokenizer "
            "puts before a text; use longer ones (--seq-len)"
        )
    rows, start = [], 0
    while start < len(stream):
        begins = tuple(stream[start : start + len(prefix)]) == prefix
        head = () if begins else prefix
        end = start + length - len(head)
        rows.append([*head, *stream[start:end]])
        start = end
    return rows


def chat_beginning(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer's chat template puts before a user's first message; empty without a template, or
    where it refuses one."""
    if not getattr(tokenizer, "chat_template", None):
        return ()
    message = {"role": "user", "content": PROBE}
    try:
        text = tokenizer.apply_chat_template([message], tokenize=False)
    except Exception:  # templates raise what they like
        return ()
    return tuple(_plain_ids(tokenizer, text[: max(0, text.find(PROBE))]))


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text alone."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _chat_ids(tokenizer: Any, chat: Chat) -> list[int]:
    """The token ids of a chat by the tokenizer's template, special tokens included."""
    try:
        ids = tokenizer.apply_chat_template(
            list(chat.messages), tokenize=True, add_generation_prompt=False
        )
    except Exception as error:  # templates raise what they like, and Jinja many kinds
        raise InputError(
            f"{chat.place}: the tokenizer's chat template refuses the messages ({first_line(error)}): "
            "change or leave out the row"
        ) from None
    if isinstance(ids, Mapping):
        ids = ids["input_ids"]
    return list(ids)
