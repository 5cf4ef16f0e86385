"""Which models can be compared: those to which an id means the same."""

import pytest
import torch

from srcr.errors import InputError
from srcr.models.checkpoint import open_model
from srcr.pipelines.candidates import open_candidates
from srcr.testing import tiny_model

TOKENS = ["<s>", "</s>", "a", "b", "c"]


class Tokenizer:
    """A vocabulary, and nothing else."""

    def __init__(self, tokens):
        self.tokens = tokens

    def get_vocab(self):
        return {token: id for id, token in enumerate(self.tokens) if token is not None}

    def __len__(self):
        return len(self.tokens)


def compare(tokens, other_tokens):
    model = tiny_model("llama")
    ours, theirs = (None if t is None else Tokenizer(t) for t in (tokens, other_tokens))
    open_candidates(open_model((model, ours)), [(model, theirs)], torch.device("cpu"))


def padded(size, *tokens):
    """The tokens, and others behind them from the id ``size`` on."""
    return [*TOKENS, *[None] * (size - len(TOKENS)), *tokens]


ROWS = tiny_model("llama").get_input_embeddings().weight.shape[0]
SAME = {
    "equal": (TOKENS, TOKENS),
    "none": (TOKENS, None),
    "a token for padding within the rows": (TOKENS, [*TOKENS, "<pad>"]),
    "tokens behind the rows": (TOKENS, padded(ROWS, "<pad>", "<x>")),
    "others behind the rows": (padded(ROWS, "<pad>"), padded(ROWS, "<x>", "<pad>")),
    "a token moved behind the rows": (padded(ROWS, "<x>"), padded(ROWS + 1, "<x>")),
}
DIFFERENT = {
    "another token": (TOKENS, [*TOKENS[:-1], "d"]),
    "two changed places": (TOKENS, [*TOKENS[:-2], "c", "b"]),
    "a token at another id": (TOKENS, [*TOKENS[:-1], None, "c"]),
}


@pytest.mark.parametrize("case", SAME)
def test_what_means_the_same_is_compared(case):
    compare(*SAME[case])
    compare(*reversed(SAME[case]))


@pytest.mark.parametrize("case", DIFFERENT)
def test_what_does_not_is_refused(case):
    for pair in (DIFFERENT[case], tuple(reversed(DIFFERENT[case]))):
        with pytest.raises(InputError, match="different tokenizers"):
            compare(*pair)
