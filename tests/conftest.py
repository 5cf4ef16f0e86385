"""Settings and the real model that every test shares."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))  # so that tests can import `reference`
#: Of each process: more threads than there are cores wait for each other. (A worker inherits what its parent
#: set for itself. Numba uses as many as torch, of so many at most.)
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
torch.set_num_threads(THREADS)
os.environ["OMP_NUM_THREADS"] = str(THREADS)
os.environ["NUMBA_NUM_THREADS"] = "2"

settings.register_profile("srcr", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("srcr")


def shared(name, what):
    """A file or folder beside the project, which is not everywhere."""
    path = Path(__file__).parents[2] / "shared" / name
    if not path.exists():
        pytest.skip(f"../shared/{name} ({what}) is not here")
    return path


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Text that models write is not kept in the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SRCR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def stories():
    """A real model: 260 thousand parameters, with a tokenizer."""
    return shared("models/stories260K", "a real model")


@pytest.fixture(scope="session")
def stories_text():
    """A real text of the kind that the model was trained on."""
    return shared("data/tinystories_sample.txt", "a real text")
