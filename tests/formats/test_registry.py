"""Formats are looked up by name, and all of them pass the suite that ships with srcr."""

import pytest
import torch

from srcr import formats
from srcr.errors import InputError
from srcr.formats import detect, get_format, load
from srcr.testing import check_format, save_tiny_model


@pytest.mark.slow
@pytest.mark.parametrize("name", formats.formats())
def test_every_format_conforms(name):
    held = check_format(name)
    assert "llama, 25 % + 4 bits" in held


def test_formats_are_known_under_their_own_names():
    assert set(formats.formats()) >= {"compressed-tensors", "dense"}
    for name, fmt in formats.formats().items():
        assert fmt.name == name
        assert fmt.summary
        assert get_format(name) is fmt


def test_an_unknown_format():
    with pytest.raises(
        InputError, match=r"'onnx' is not known: use archive, compressed-tensors, dense"
    ):
        get_format("onnx")


def test_any_model_folder_is_loaded(tmp_path):
    save_tiny_model(tmp_path / "plain", "gemma3")
    assert detect(tmp_path / "plain").name == "dense"
    model = load(tmp_path / "plain", torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.training
