import random

import pytest
import torch

from srcr.data.specs import Calibration
from srcr.models.checkpoint import open_model
from srcr.pipelines.levels import fill_database, open_context, open_evaluator
from srcr.pipelines.options import RunOptions
from srcr.planning.evaluators.ray import connected
from srcr.planning.space import SearchSpace
from srcr.planning.specs import MeasurementSpec, Resources
from srcr.plans.specs import CompressionLevel, QuantSpec
from srcr.testing import save_tiny_model

pytestmark = pytest.mark.slow

QUIET = RunOptions(quiet=True, device="cpu")
LEVELS = (CompressionLevel(0, 3), CompressionLevel(0.2, 4), CompressionLevel(0, 5))


def test_a_worker_that_is_killed_loses_its_trial_not_the_search(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else they wait for all other tests
    space = SearchSpace(LEVELS, quant=QuantSpec(group_size=-1))
    opened = open_model(save_tiny_model(tmp_path / "base", "llama"))
    ids = torch.randint(0, 96, (40, 24), generator=torch.Generator().manual_seed(0))
    context, _ = open_context(opened, SearchSpace(), Calibration(ids), MeasurementSpec(), 0, QUIET)
    database = fill_database(context, space, Resources(), tmp_path / "levels", None, QUIET)
    rng = random.Random(0)
    assignments = [tuple(rng.choice(LEVELS) for _ in context.groups) for _ in range(12)]
    local = open_evaluator(context, database, None, MeasurementSpec())
    expected = [result.kl for result in local.measure(assignments)]
    with connected("local") as ray:
        spread = fill_database(context, space, Resources(), tmp_path / "spread", ray, QUIET)
        for group in context.groups:
            for level in LEVELS:
                assert spread.find(group, level) == database.find(group, level)
        cluster = open_evaluator(context, database, ray, MeasurementSpec())
        assert cluster.parallel >= 1
        results = []
        for number, result in enumerate(cluster.measure(assignments)):
            results.append(result.kl)
            if number == 3:
                ray.kill(cluster.actors[0], no_restart=False)
    assert results == pytest.approx(expected, rel=1e-5)
