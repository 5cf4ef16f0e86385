"""Hidden states in a file."""

import pytest
import torch

from srcr.engine.activations import ActivationFile


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_gives_back_what_it_was_given(tmp_path, dtype):
    states = [
        torch.randn(n, 3, 4, generator=torch.Generator().manual_seed(n)).to(dtype)
        for n in (2, 5, 1)
    ]
    with ActivationFile(tmp_path, torch.device("cpu")) as file:
        for state in states:
            file.append(state)
        file[1] = states[1].flip(0)
        assert len(file) == 3
        assert torch.equal(file[0], states[0])
        assert torch.equal(file[1], states[1].flip(0))
        assert torch.equal(file[2], states[2])
