"""How fast models read and write: what is counted, not how long it takes."""

import pytest
import torch

from srcr.errors import InputError
from srcr.metrics.speed import SpeedSpec, measure_speed
from srcr.serialize import from_dict, to_dict
from srcr.testing.families import tiny_model


def test_every_model_runs_in_every_round() -> None:
    base, small = tiny_model("llama"), tiny_model("llama", intermediate_size=16)
    seen, done = [], []
    for name, model in (("base", base), ("small", small)):
        model.register_forward_pre_hook(
            lambda _, args, name=name: seen.append((name, args[0].shape[1]))
        )
    ids = torch.randint(0, 96, (4, 20), generator=torch.Generator().manual_seed(0))
    (speed,) = measure_speed(base, [small], ids, SpeedSpec(16, 4, 3), done.append)
    assert done == [0, 1, 2, 3]
    assert seen.count(("base", 16)) == seen.count(("small", 16)) == 4
    assert seen.count(("base", 1)) == seen.count(("small", 1)) == 4 * 3
    for part in (speed.prefill, speed.decode):
        assert part.base > 0
        assert part.compressed > 0
        assert part.ratio.low <= part.ratio.value <= part.ratio.high
    assert (speed.prompt_len, speed.rounds, speed.dtype) == (16, 3, "float32")
    assert from_dict(type(speed), to_dict(speed)) == speed


def test_a_short_text_gives_a_short_prompt() -> None:
    model = tiny_model("gpt2")
    ids = torch.randint(0, 96, (2, 5), generator=torch.Generator().manual_seed(0))
    (speed,) = measure_speed(model, [model], ids, SpeedSpec(rounds=2, new_tokens=2))
    assert speed.prompt_len == 5


@pytest.mark.parametrize("values", [(0, 4, 3), (8, 1, 3), (8, 4, 1)])
def test_what_gives_no_figure_is_refused(values: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match="speed takes"):
        SpeedSpec(*values)
