"""BlockwiseModel: blocks run after each other give what the whole model gives."""

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from srcr.errors import InputError
from srcr.models import blockwise
from srcr.models.checkpoint import open_model
from srcr.testing import FAMILIES, tiny_model

LENGTH = 40  # longer than the sliding windows of mistral and gemma (16)


def token_ids(seed, n=2, length=LENGTH):
    return torch.randint(0, 96, (n, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def block_by_block(source, ids):
    """Hidden states after the last block, by the engine's way of running a model."""
    ((hidden, arguments),) = source.embed([ids])
    for index in range(len(source.topology.blocks)):
        args, kwargs = arguments[index]
        output = source.block(index)(hidden, *args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden


@torch.no_grad()
def whole_model(model, topology, ids):
    """(hidden states after the last block, logits) of an ordinary forward pass."""
    seen = []
    last = model.get_submodule(topology.blocks[-1].name)
    handle = last.register_forward_hook(lambda _, __, output: seen.append(output))
    try:
        logits = model(ids, use_cache=False).logits
    finally:
        handle.remove()
    return (seen[0][0] if isinstance(seen[0], tuple) else seen[0]), logits


@torch.no_grad()
def logits_from(model, topology, ids, hidden):
    """Logits of ``model`` with what its last block gives replaced by ``hidden``."""
    last = model.get_submodule(topology.blocks[-1].name)

    def put(_, __, output):
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = last.register_forward_hook(put)
    try:
        return model(ids, use_cache=False).logits
    finally:
        handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_after_each_other_give_the_models_own_states_and_logits(family):
    model = tiny_model(family)
    source = open_model(model).blockwise
    # The arguments of a batch's shape are computed once: the second batch must fit them as well.
    for ids in (token_ids(1), token_ids(2), token_ids(3, n=3), token_ids(4, length=9)):
        expected, logits = whole_model(model, source.topology, ids)
        hidden = block_by_block(source, ids)
        torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
        ours = logits_from(model, source.topology, ids, hidden)
        torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("running", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_bfloat16_model_agrees_with_itself_in_either_precision(family, running, monkeypatch):
    monkeypatch.setattr(blockwise, "running_precision", lambda *_: running)
    model = tiny_model(family, torch.bfloat16)
    source = open_model(model).blockwise
    assert source.dtype == torch.bfloat16
    ids = token_ids(1)
    ((hidden, _),) = source.embed([ids])
    assert hidden.dtype == running
    assert {p.dtype for p in source.block(1).parameters()} == {running}
    expected, _ = whole_model(model, source.topology, ids)
    states = block_by_block(source, ids)
    assert states.dtype == running
    error = (states.float() - expected.float()).norm() / expected.float().norm()
    assert error < 0.03


def test_only_bfloat16_runs_as_it_is(monkeypatch):
    for fast in (False, True):
        monkeypatch.setattr(blockwise, "multiplies_bfloat16", lambda fast=fast: fast)
        precisions = [
            blockwise.running_precision(dtype, torch.device("cpu"))
            for dtype in (torch.float32, torch.float16, torch.bfloat16)
        ]
        assert precisions == [torch.float32] * 2 + [torch.bfloat16 if fast else torch.float32]


@pytest.mark.parametrize("family", FAMILIES)
def test_embedding_and_copies_leave_the_model_alone(family):
    model = tiny_model(family)
    ids = token_ids(1)
    with torch.no_grad():
        before = model(ids).logits
    source = open_model(model).blockwise
    list(source.embed([ids]))
    for parameter in source.block(0).parameters():
        parameter.data.zero_()
    for block in source.topology.blocks:
        assert "forward" not in vars(model.get_submodule(block.name))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_a_failing_embedding_leaves_the_model_alone():
    model = tiny_model("llama")
    ids = token_ids(1)
    with torch.no_grad():
        before = model(ids).logits
    source = open_model(model).blockwise
    with pytest.raises(IndexError):
        list(source.embed([torch.full((1, 4), 96)]))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_a_model_that_is_more_than_its_blocks_is_refused():
    """Something happens between the blocks that running them one by one misses."""
    model = tiny_model("llama")
    decoder = model.model

    class Scaled(type(decoder)):
        def forward(self, input_ids, **_):
            hidden = self.embed_tokens(input_ids)
            positions = torch.arange(input_ids.shape[1])[None]
            rotary = self.rotary_emb(hidden, positions)
            for block in self.layers:
                hidden = block(hidden * 1.5, position_embeddings=rotary, position_ids=positions)
            return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))

    decoder.__class__ = Scaled
    with pytest.raises(InputError, match=r"LlamaForCausalLM is more than its decoder blocks"):
        open_model(model)
