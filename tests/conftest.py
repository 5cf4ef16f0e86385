"""Settings that every test shares."""

import sys
from pathlib import Path

import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))  # so that tests can import `reference`
torch.set_num_threads(2)

settings.register_profile("srcr", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("srcr")
