"""What a search is decided by, and that nothing is measured on what it was chosen by."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from srcr.data.specs import Calibration
from srcr.data.splits import item_indices, search_sequences
from srcr.errors import InputError
from srcr.models.checkpoint import open_model
from srcr.pipelines.levels import open_context
from srcr.pipelines.options import RunOptions
from srcr.planning.objective import check_measurable, check_objective
from srcr.planning.problem import search_problem
from srcr.planning.space import SearchSpace, level_grid
from srcr.planning.specs import ExplorationSpec, MeasurementSpec, SearchSpec
from srcr.plans.objective import Constraint, Objective
from srcr.plans.plan import Target
from srcr.plans.specs import CompressionLevel, QuantSpec
from srcr.testing import tiny_model

pytestmark = pytest.mark.slow

SPACE = SearchSpace(level_grid([0.0, 0.25], [3, 4, 5]), quant=QuantSpec(group_size=-1))
TARGET = Target(tcr=0.8)
LENGTH = 36


@pytest.fixture(scope="module")
def opened():
    return open_model("bundled")


def sources(folder):
    """The same text in every form: none of its lines comes twice."""
    lines = [f"The {a} of the {b} sees {c} things near the {a} tree." for a in "abcdefgh"
             for b in "ijklmnop" for c in range(20)]  # fmt: skip
    (folder / "lines.txt").write_text("\n".join(lines))
    (folder / "lines.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in lines))
    ids = torch.randint(3, 1000, (60, LENGTH), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": torch.cat([ids, ids[:9], ids[:9]])}, folder / "ids.safetensors")
    return {
        "self": "self", "bundled": "bundled", "txt": str(folder / "lines.txt"),
        "jsonl": str(folder / "lines.jsonl"), "ids": str(folder / "ids.safetensors"),
        "in memory": lines,
    }  # fmt: skip


def context_of(opened, source, length=LENGTH):
    calibration = Calibration(source, 4, length)
    return open_context(opened, SearchSpace(), calibration, None, 0, RunOptions(quiet=True))[0]


def problem_of(context, objective, target=TARGET):
    return search_problem(context, target, SPACE, "dense", SearchSpec(objective=objective))


@pytest.fixture(scope="module", params=["self", "bundled", "txt", "jsonl", "ids", "in memory"])
def context(request, opened, tmp_path_factory):
    """The bundled model with a text of every form, split."""
    return context_of(opened, sources(tmp_path_factory.mktemp("text"))[request.param])


def rows(tokens):
    return {tuple(row) for row in tokens.input_ids.tolist()}


def pieces(tokens, length):
    """Every piece of a text's sequences."""
    return {
        row[start : start + length]
        for row in rows(tokens)
        for start in range(len(row) - length + 1)
    }


@pytest.mark.parametrize("measure", ["kl", "top1", "semantic", "sr", "srcr", "knowledge"])
def test_nothing_is_measured_on_what_it_was_chosen_by(measure, context):
    problem = problem_of(context, Objective(measure))
    splits = problem.context.splits
    parts = [rows(part) for part in splits.parts()]
    for i, part in enumerate(parts):
        assert len(part) >= 2
        for other in parts[:i]:
            assert part.isdisjoint(other)
    assert rows(problem.choice.text) == parts[2]
    assert rows(problem.test.text) == parts[3]
    tasks = problem.choice.tasks, problem.test.tasks
    if measure in ("sr", "srcr", "knowledge"):
        choice, test = (
            set(item_indices(41, spec.part, problem.context.seed, "x")) for spec in tasks
        )
        assert choice.isdisjoint(test)
        assert choice | test == set(range(41))
    else:
        assert tasks == (None, None)
    if measure != "semantic":
        assert (problem.choice.semantic, problem.test.semantic) == (None, None)
        return
    choice, test = problem.choice.semantic.prompts, problem.test.semantic.prompts
    length = choice.input_ids.shape[1]
    assert rows(choice).isdisjoint(rows(test))
    for prompts, text in ((choice, splits.choice), (test, splits.test)):
        assert rows(prompts) <= pieces(text, length)
        for seen in (splits.calibration, splits.search):
            assert rows(prompts).isdisjoint(pieces(seen, length))
    assert rows(test).isdisjoint(pieces(splits.choice, length))


def test_a_constraint_has_its_own_objective(opened, tmp_path):
    ids = sources(tmp_path)["ids"]
    target = Constraint(Objective("semantic"), 0.9)
    problem = problem_of(context_of(opened, ids), Objective("kl"), target)
    assert problem.objective.measure == "semantic"
    assert problem.choice.semantic is not None


def test_objectives_that_cannot_be_measured_are_refused():
    opened = open_model(tiny_model("llama"))
    check_measurable(Objective("semantic"), opened)
    with pytest.raises(InputError, match="tasks are text, but LlamaForCausalLM has no tokenizer"):
        check_measurable(Objective("sr"), opened)
    with pytest.raises(InputError, match="task folder nonsense does not exist"):
        check_objective(Objective("./nonsense"))
    short = open_model(tiny_model("llama", max_position_embeddings=48))
    with pytest.raises(InputError, match="32 new ones exceed the model's context of 48"):
        check_measurable(Objective("semantic"), short)


def test_too_little_text_is_refused_with_the_reason(opened, tmp_path):
    ids = torch.randint(3, 1000, (20, LENGTH), generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="8 sequences, 8 of them different: a search calibrates"):
        context_of(opened, ids[:8])
    with pytest.raises(InputError, match="54 sequences, 4 of them different: a search"):
        context_of(opened, torch.cat([ids[:4], ids[:1].repeat(50, 1)]))
    repeated = ids[:10].repeat(6, 1)
    assert problem_of(context_of(opened, repeated), Objective()).choice.text.input_ids.shape[0] == 2
    with pytest.raises(InputError, match="prompts of 32 tokens do not fit into sequences of 16"):
        problem_of(context_of(opened, ids, length=16), Objective("semantic"))
    alike = ids.clone()
    alike[:, :-1] = alike[0, :-1]  # all prompts are the same
    with pytest.raises(InputError, match="fewer than 2 different prompts of 32 tokens"):
        problem_of(context_of(opened, alike), Objective("semantic"))


@pytest.fixture(scope="module")
def base_problem():
    opened = open_model(tiny_model("llama"))
    ids = torch.randint(0, 96, (40, 24), generator=torch.Generator().manual_seed(0))

    def make(ids=ids, target=TARGET, space=SPACE, name="dense", spec=None, seed=0, opened=opened):
        spec = spec or SearchSpec()
        options = RunOptions(seed=seed, quiet=True)
        context, _ = open_context(opened, SearchSpace(), Calibration(ids, 16, 24), None, 0, options)
        return search_problem(context, target, space, name, spec)

    make.ids = ids
    return make


CHANGES = {
    "target": lambda ids: {"target": Target(tcr=0.79)},
    "data": lambda ids: {"ids": ids.flip(0)},
    "model": lambda ids: {"opened": open_model(tiny_model("llama", seed=1))},
    "levels": lambda ids: {"space": replace(SPACE, levels=SPACE.levels[1:])},
    "objective": lambda ids: {"spec": SearchSpec(objective=Objective("top1"))},
    "trials": lambda ids: {"spec": SearchSpec(trials=20)},
    "exploration": lambda ids: {"spec": SearchSpec(exploration=ExplorationSpec(patience=5))},
    "measurement": lambda ids: {"spec": SearchSpec(measurement=MeasurementSpec(batches=2))},
    "seed": lambda ids: {"seed": 1},
    "format": lambda ids: {"name": "compressed-tensors"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_decides_the_result_is_in_the_fingerprint(change, base_problem):
    base = base_problem()
    other = base_problem(**CHANGES[change](base_problem.ids))
    assert other.fingerprint != base.fingerprint
    differing = {k for k, v in base.settings.items() if other.settings[k] != v}
    assert differing == {change}
    shared = change in ("objective", "trials", "exploration")
    assert (other.study_fingerprint == base.study_fingerprint) == shared
    assert (other.run_settings == base.run_settings) == (change == "trials")


def test_what_decides_nothing_is_not_in_the_fingerprint(base_problem):
    spec = SearchSpec(measurement=MeasurementSpec(cache_bytes=1), storage="sqlite:///x.db")
    assert base_problem(spec=spec).fingerprint == base_problem().fingerprint


def test_levels_far_from_the_budget_are_left_out(base_problem):
    space = replace(SPACE, levels=level_grid([0.0, 0.5], [2, 3, 8]))
    problem = base_problem(space=space)
    assert CompressionLevel(0.0, 8) not in problem.space.levels
    assert set(problem.uniform) <= set(problem.space.levels)
    assert [level.num_bits for level in problem.uniform] == [8]


@pytest.mark.parametrize(
    ("parameters", "sequences"),
    [(1, 24), (260_000, 24), (1_500_000, 16), (2_100_000, 12), (8_000_000_000, 12)],
)
def test_small_models_are_searched_on_more_text(parameters, sequences):
    assert search_sequences(parameters) == sequences
