"""--memory: whatever the budget, the same bytes; or a budget that is refused with one that is enough."""

import json

import pytest
import torch
from safetensors.torch import save_file

from srcr.testing import save_tiny_model

pytestmark = pytest.mark.slow


def result(folder):
    """Every file that must not differ."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.name not in ("srcr.json", "README.md")
    }


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_smallest_budget_that_is_named_works_and_gives_the_same_bytes(srcr, tmp_path, family):
    """So much text that a budget decides what is cached."""
    context = {"n_positions" if family == "gpt2" else "max_position_embeddings": 256}
    model = save_tiny_model(tmp_path / "model", family, **context)
    generator = torch.Generator().manual_seed(0)
    ids = tmp_path / "ids.safetensors"
    save_file({"input_ids": torch.randint(0, 96, (256, 256), generator=generator)}, ids)

    def command(out, *more):
        return srcr(
            "compress", model, "-o", tmp_path / out, "--calibration", ids, "--samples", 256,
            "--sparsity", 0.25, "--quant-method", "rtn", *more,
        )  # fmt: skip

    refused = command("tight", "--memory", "100MB")
    assert refused.code == 2
    assert not list(tmp_path.glob("tight*"))
    smallest = refused.error().partition("use at least ")[2].partition(",")[0]
    tight = command("tight", "--memory", smallest)
    assert tight.code == 0, tight.err
    assert "begun again" in tight.err
    assert "begun again" not in command("spacious", "--memory", "100GB").err
    assert result(tmp_path / "tight") == result(tmp_path / "spacious")


def test_calibration_by_the_model_itself_needs_it_whole(srcr, tiny, tmp_path):
    refused = srcr("compress", tiny, "-o", tmp_path / "out", "--memory", "10MB")
    assert refused.code == 2
    assert "has to be loaded whole" in refused.error()
    assert "another --calibration" in refused.error()


def test_a_config_file_takes_it(srcr, tiny, ids, tmp_path):
    (tmp_path / "run.yaml").write_text("memory: 1MB\n")
    command = ["compress", tiny, "-o", tmp_path / "out", "--calibration", ids]
    assert "--memory 1MB is too little" in srcr(*command, "--config", tmp_path / "run.yaml").error()
    done = srcr(*command, "--config", tmp_path / "run.yaml", "--memory", "100GB", "--json")
    assert json.loads(done.out)["peak_memory_bytes"] > 0
