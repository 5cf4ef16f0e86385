"""What a model goes on with by its cache is what it goes on with without."""

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from architectures import tiny_architecture
from srcr.data.decoding import Decoder
from srcr.data.sampling import write_rows
from srcr.metrics.continuations import continue_greedily

#: Caches under each name, recurrent ones, a model without any, and one whose cache cannot be used.
KINDS = [
    "llama",
    "gemma3_text",
    "mamba",
    "mamba2",
    "falcon_mamba",
    "bamba",
    "rwkv",
    "openai-gpt",
    "qwen3_next",
]


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "capacity"), [*((kind, 9) for kind in KINDS), ("llama", None), ("gemma3_text", 5)]
)
def test_logits_are_those_of_the_whole_row(kind, capacity):
    model = tiny_architecture(kind)
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    decoder = Decoder(model, capacity)
    pieces = [decoder.logits(ids[:, :3]), *(decoder.logits(ids[:, i, None]) for i in range(3, 9))]
    whole = model(ids, use_cache=False).logits[:, 2:]
    torch.testing.assert_close(torch.stack(pieces, 1), whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_cache_that_gives_other_logits_is_not_used():
    model = tiny_architecture("llama")

    def forgetful(ids, use_cache, past_key_values=None):
        output = model(ids, use_cache=False)
        output["past_key_values"] = "nothing" if use_cache else None
        return output

    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    decoder = Decoder(forgetful)
    pieces = [decoder.logits(ids[:, i, None]) for i in range(9)]
    whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.stack(pieces, 1), whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_cached_step_sees_only_the_new_token():
    model, widths = tiny_architecture("llama"), []

    def watched(ids, **kwargs):
        widths.append(ids.shape[1])
        return model(ids, **kwargs)

    decoder = Decoder(watched)
    for _ in range(5):
        decoder.logits(torch.full((2, 1), 5))
    assert widths == [1, 1, 2, 1, 1, 1]  # once the whole row, to compare


@pytest.mark.parametrize("kind", ["mamba2", "rwkv"])
def test_models_with_other_caches_write_text(kind):
    model = tiny_architecture(kind)
    numbers = torch.rand(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids = write_rows(model, torch.ones(3, 1, dtype=torch.long), numbers)
    assert ids.shape == (3, 8)
    assert torch.equal(ids, write_rows(model, torch.ones(3, 1, dtype=torch.long), numbers))
    continued = continue_greedily(model, ids, 4, stop=())
    expected = ids
    for _ in range(4):
        logits = model(expected, use_cache=False).logits[:, -1]
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(continued, expected[:, 8:])


@torch.no_grad()
def test_logits_that_are_not_finite_come_through():
    logits = torch.full((1, 1, 96), float("nan"))
    output = CausalLMOutputWithPast(logits=logits, past_key_values="kept")
    decoder = Decoder(lambda ids, **_: output)
    for _ in range(3):
        assert bool(decoder.logits(torch.ones(1, 1, dtype=torch.long)).isnan().all())
