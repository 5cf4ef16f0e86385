"""Settings and the real model that every test shares."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))  # so that tests can import `reference`
torch.set_num_threads(2)

settings.register_profile("srcr", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("srcr")


@pytest.fixture(scope="session")
def stories():
    """A real model: 260 thousand parameters, with a tokenizer."""
    folder = Path(__file__).parents[2] / "shared/models/stories260K"
    if not folder.is_dir():
        pytest.skip("../shared/models/stories260K (a real model) is not here")
    return folder


@pytest.fixture(scope="session")
def stories_text():
    """A real text of the kind that the model was trained on."""
    path = Path(__file__).parents[2] / "shared/data/tinystories_sample.txt"
    if not path.is_file():
        pytest.skip("../shared/data/tinystories_sample.txt is not here")
    return path
