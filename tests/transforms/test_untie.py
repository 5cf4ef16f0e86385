"""An output head of its own: the same model, with two matrices where there was a shared one."""

import pytest
import torch

from srcr.models.checkpoint import load_from, open_model
from srcr.testing import FAMILIES, save_tiny_model, tiny_model
from srcr.transforms.untie import untie


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("from_folder", [True, False])
def test_the_logits_stay_and_the_head_is_its_own(family, from_folder, tmp_path):
    base = save_tiny_model(tmp_path / "m", family) if from_folder else tiny_model(family)
    opened = open_model(base)
    overlay = opened.transformed(untie(opened.source))
    assert not overlay.topology.tied
    model = load_from(overlay.source)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, tiny_model(family)(ids).logits)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert embedding is not head
    if opened.topology.tied:
        assert torch.equal(embedding, head)
    assert overlay.source.config_dict()["tie_word_embeddings"] is False
