"""Documents in rows that each begin as the model expects, and nothing of them lost."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, CanineTokenizer, PreTrainedTokenizerFast

from srcr.data.chat import Chat
from srcr.data.packing import SpecialTokens, cut_rows, tokenize
from srcr.errors import InputError
from srcr.models.load import load_tokenizer

WORDS = ["The", "text", ".", "a", "b", "c"]
BOS, EOS = 0, 1


def fast(template):
    """A tokenizer of a few words that puts special tokens around a text by a template."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<s>", "</s>", *WORDS])}, "a"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        special = [("<s>", BOS), ("</s>", EOS)]
        core.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


#: Tokenizers, and what they put before and behind a text.
TOKENIZERS = {
    "nothing": (fast(None), (), ()),
    "bos": (fast("<s> $A"), (BOS,), ()),
    "eos": (fast("$A </s>"), (), (EOS,)),
    "both": (fast("<s> $A </s>"), (BOS,), (EOS,)),
    "two": (fast("<s> <s> $A"), (BOS, BOS), ()),
    "python, eos": (ByT5Tokenizer(), (), (1,)),
    "python, both": (CanineTokenizer(), (57344,), (57345,)),
}
KINDS = pytest.mark.parametrize("kind", TOKENIZERS)


@KINDS
def test_what_a_tokenizer_puts_around_a_text(kind):
    tokenizer, prefix, suffix = TOKENIZERS[kind]
    assert SpecialTokens.of(tokenizer) == SpecialTokens(prefix, suffix, (tokenizer.eos_token_id,))


def test_a_real_tokenizer(stories):
    assert SpecialTokens.of(load_tokenizer(stories)) == SpecialTokens((1,), (), (2,))


def test_a_word_that_is_cut_otherwise_behind_a_special_token():
    """As a sentencepiece tokenizer without its dummy space."""

    class Legacy:
        all_special_ids = (7, 8)
        eos_token_id = None

        def __call__(self, text, add_special_tokens=True, verbose=True):
            return {"input_ids": [7, 8, 20, 21, 8] if add_special_tokens else [30, 21]}

    assert SpecialTokens.of(Legacy()) == SpecialTokens((7, 8), (8,), ())


@given(
    stream=st.lists(st.integers(0, 3), max_size=40),
    prefix=st.lists(st.integers(0, 3), max_size=3).map(tuple),
    length=st.integers(1, 9),
)
def test_rows_begin_with_the_prefix_and_hold_the_stream(stream, prefix, length):
    assume(length > len(prefix))
    rows = cut_rows(stream, prefix, length)
    position = 0
    for number, row in enumerate(rows):
        assert tuple(row[: len(prefix)]) == prefix
        assert len(row) == length or (number == len(rows) - 1 and len(row) < length)
        whole = tuple(stream[position : position + len(prefix)]) == prefix
        content = row if whole else row[len(prefix) :]
        assert content == stream[position : position + len(content)]
        assert content
        position += len(content)
    assert position == len(stream)


def test_a_prefix_that_fills_a_row():
    with pytest.raises(InputError, match=r"sequences of 2 tokens are too short.*\(--seq-len\)"):
        cut_rows([4, 5, 6], (0, 0), 2)


@given(texts=st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6), min_size=1))
@KINDS
def test_texts_are_separated_as_the_tokenizer_separates_them(kind, texts):
    tokenizer, prefix, suffix = TOKENIZERS[kind]
    documents = [" ".join(words) for words in texts]
    special = SpecialTokens.of(tokenizer)
    stream = tokenize(documents, tokenizer, special, 10**9)
    whole = [i for text in documents for i in tokenizer(text)["input_ids"]]
    if prefix or suffix:
        expected = whole[len(prefix) : len(whole) - len(suffix)]
    else:
        expected = [i for text in documents for i in (*tokenizer(text)["input_ids"], EOS)][:-1]
    assert stream.ids == expected
    assert not stream.joined


def test_a_tokenizer_with_no_end_of_text_separates_by_nothing():
    tokenizer = fast(None)
    tokenizer.eos_token = None
    special = SpecialTokens.of(tokenizer)
    assert tokenize(["a", "b"], tokenizer, special, 99).ids == [5, 6]


def test_reading_stops_when_there_is_enough():
    def documents():
        yield from ["a b", "c a", "b c"]
        raise AssertionError("read too far")

    tokenizer = fast("<s> $A")
    stream = tokenize(documents(), tokenizer, SpecialTokens.of(tokenizer), 8)
    assert stream.ids == [5, 6, BOS, 7, 5, BOS, 6, 7]


class TestChats:
    CHAT = Chat(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}), "row 3")

    def stream(self, tokenizer, documents):
        return tokenize(documents, tokenizer, SpecialTokens.of(tokenizer), 99)

    def test_the_template_brings_the_special_tokens(self):
        tokenizer = fast("<s> $A")
        tokenizer.chat_template = "<s>{% for m in messages %}{{ m['content'] }} {% endfor %}</s>"
        stream = self.stream(tokenizer, [self.CHAT, self.CHAT])
        assert stream.ids == [BOS, 5, 6, EOS] * 2
        assert cut_rows(stream.ids, (BOS,), 4) == [[BOS, 5, 6, EOS]] * 2

    def test_chats_beside_texts(self):
        tokenizer = fast("<s> $A </s>")
        tokenizer.chat_template = "<s>{% for m in messages %}{{ m['content'] }} {% endfor %}</s>"
        stream = self.stream(tokenizer, ["c", self.CHAT, "c", "c"])
        assert stream.ids == [7, EOS, BOS, 5, 6, EOS, BOS, 7, EOS, BOS, 7]

    def test_nothing_is_put_between_where_the_template_puts_nothing(self):
        tokenizer = fast(None)
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
        assert self.stream(tokenizer, [self.CHAT, self.CHAT]).ids == [5, 6, 5, 6]

    def test_without_a_template_the_messages_are_text(self):
        tokenizer = fast("<s> $A")
        stream = self.stream(tokenizer, [self.CHAT, "c"])
        assert stream.ids == [5, 6, BOS, 7]
        assert stream.joined
        assert self.CHAT.text == "a\n\nb"

    @pytest.mark.parametrize(
        ("template", "reason"),
        [
            ("{{ raise_exception('no such role') }}", "no such role"),
            ("{{ messages[0].content.nothing.more }}", "nothing"),
        ],
    )
    def test_a_template_that_refuses(self, template, reason):
        tokenizer = fast("<s> $A")
        tokenizer.chat_template = template
        with pytest.raises(InputError, match=rf"^row 3: the tokenizer's chat template.*{reason}"):
            self.stream(tokenizer, [self.CHAT])
