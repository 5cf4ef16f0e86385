"""The records as JSON: the keys of the design, no others, and back again without loss."""

from dataclasses import replace

import jsonschema
import pytest

import schemas
from srcr.plans.objective import Constraint, Objective
from srcr.plans.plan import CompressionPlan, LayerPlan, Target
from srcr.plans.recovery import RecoverySpec
from srcr.plans.specs import PruneSpec, QuantSpec, SolverSpec
from srcr.records.estimate import Estimate
from srcr.records.evaluation import (
    Comparison,
    Divergence,
    Evaluation,
    ItemScores,
    KlEstimate,
    Perplexity,
    Semantic,
    TaskScore,
)
from srcr.records.inspection import InspectedBlock, InspectedEmbedding, InspectedGroup, Inspection
from srcr.records.recovery import RecoveryRecord, TrainingPoint
from srcr.records.run import LayerRecord, Probe, Rates, RunRecord, StructureRecord, Verification
from srcr.records.search import ChoiceScore, Measurement, SearchResult
from srcr.records.sensitivity import GroupLosses, LevelLoss, SensitivityTable
from srcr.records.text import TextRecord
from srcr.records.verification import EngineCheck, VerificationResult
from srcr.serialize import from_dict, to_dict

RATES = Rates(0.25, 4.0, 0.8125, 0.3, 10, 5, 5, "transformers", "srcr.json", 3.5)
TEXT = TextRecord("self", 2, 8, "ff", ("a", "b"), 16, (1,))
ESTIMATE = Estimate(0.9, (0.8, 1.0))
KL = KlEstimate(0.1, (0.05, 0.2), 0.01, 0.2, 0.4, 1.0)
PLAN = CompressionPlan(
    (LayerPlan("a", PruneSpec(sparsity=0.25), QuantSpec(num_bits=4)), LayerPlan("b")),
    Target(tcr=0.8),
    solver=SolverSpec(dense_share=0.5),
    embeddings=(LayerPlan("e", None, QuantSpec(num_bits=8)),),
)
RECOVERY = RecoveryRecord(
    RecoverySpec("both", 3, 1.5), "small", TEXT, TEXT, 3, 2, 48, 1.5, ESTIMATE, ESTIMATE,
    Estimate(-0.1, (-0.2, -0.05)), True,
    (TrainingPoint(0, None, 0.2, 0.1), TrainingPoint(2, 0.1, 0.1, 0.1)), "no memory", (True, False), "33",
)  # fmt: skip
RUN = RunRecord(
    base="base", base_sha256="00", command="srcr compress", format="dense", rates=RATES,
    plan_fingerprint="11", calibration=TEXT,
    layers=(LayerRecord("a", (2, 3), 0.25, 4, 0.8125, 0.3, 3.5, 3e-7),), versions={"torch": "2"},
    seconds=1.5, peak_memory_bytes=7,
    verification=Verification(16, 2e-4, 1e-3, "transformers", "float32"), notes=("a note",),
    compute={"blocks": "float32"},
    embeddings=(LayerRecord("e", (4, 3), 0.0, 8, 0.5, 0.1, 7.5, 1e-5),),
    structures=(StructureRecord("layers", 4, 3, (1,), True, (0.1,)),),
    recoveries=(RECOVERY,), probe=Probe((1, 2), (3, 4), (-0.5, -0.25)),
)  # fmt: skip
EVALUATION = Evaluation(
    base="base", compressed="small", rates=RATES, plan_fingerprint="11",
    divergence=Divergence(KL, ESTIMATE, Perplexity(2.0, 2.2, ESTIMATE), 28, ESTIMATE),
    semantic=Semantic(
        0.9, (0.8, 1.0), 0.4, 0.8, (0.7, 0.9), "base", 12, 8, 8, 0.5,
        (Comparison("a", "b", "c", 0.1),), "self",
    ),
    tasks={"t": TaskScore(0.9, 0.8, 0.25, 4, 0.85, (0.8, 0.9), 0.5, 0.1, "acc", "a note")},
    sr=0.85, sr_ci95=(0.8, 0.9), srcr=0.6, srcr_ci95=(0.5, 0.7),
    items={"t": ItemScores((1.0, 0.0), (1.0, 1.0))}, text=replace(TEXT, rows=None),
    dtype="float32", includes={"tcr": "linears"}, versions={"torch": "2"}, seconds=1.5,
    command="srcr evaluate", plan=PLAN,
)  # fmt: skip
BARE = Evaluation(
    base="base", compressed="small", rates=replace(RATES, entropy_bits=None),
    divergence=EVALUATION.divergence, text=replace(TEXT, rows=None), dtype="float32", seconds=1.5,
)  # fmt: skip
TABLE = SensitivityTable(
    "base", "00", TEXT,
    (GroupLosses(("a", "b"), 6, (LevelLoss(0.25, 4, 0.1, 0.01), LevelLoss(0.0, 3, 0.2))),),
    PruneSpec(), QuantSpec(), SolverSpec(), 1.5, TEXT,
)  # fmt: skip
SEARCH = SearchResult(
    model="base", target=Target(stored_bytes=9), command="srcr search", trials=3, seconds=1.5,
    groups=(("a", "b"),), sensitivity=TABLE,
    measured=(Measurement(0.1, True, ("25%+4", None)), Measurement(0.2, False, (None, None))),
    chosen="small", objective=Objective("sr", ("bundled",), 50),
    choice={"small": ChoiceScore(KL, 0.9), "other": ChoiceScore(KL, None)},
    finalists=(EVALUATION, BARE), fingerprint="22", settings={"seed": "0"},
)  # fmt: skip
INSPECTION = Inspection(
    "base", "Llama", "float32", 20, 12, 80, "lm_head", False, False,
    (InspectedBlock("layers.0", (InspectedGroup(("a", "b"), ((2, 3), (2, 3))),)),),
    (InspectedEmbedding("e", (4, 3), 8),),
)  # fmt: skip
VERIFICATION = VerificationResult(
    "small", "gguf", 32, (EngineCheck("llama.cpp", "fails", "a reason", 0.1, 0.05, 0.9),)
)
ARTEFACTS = {
    "evaluation.json": (EVALUATION, schemas.EVALUATION),
    "evaluation.json of a search": (replace(EVALUATION, plan=None), schemas.EVALUATION),
    "srcr.json": (RUN, schemas.RUN),
    "search.json": (SEARCH, schemas.SEARCH),
    "sensitivity table": (TABLE, schemas.TABLE),
    "inspection": (INSPECTION, schemas.INSPECTION),
    "verification": (VERIFICATION, schemas.VERIFICATION_RESULT),
}
each = pytest.mark.parametrize(("record", "schema"), ARTEFACTS.values(), ids=ARTEFACTS)


@each
def test_a_record_has_the_keys_of_the_design(record, schema):
    schemas.check(to_dict(record), schema)


@each
def test_a_key_that_is_renamed_is_noticed_wherever_it_is(record, schema):
    copies = list(schemas.renamed(to_dict(record), schema))
    assert {path[0] for path, _ in copies} == set(to_dict(record))
    validator = jsonschema.Draft202012Validator(schema)
    assert not [path for path, changed in copies if validator.is_valid(changed)]


@each
def test_a_record_survives_its_json(record, schema):
    assert from_dict(type(record), to_dict(record)) == record


def test_what_was_not_measured_is_null_and_not_missing():
    data = to_dict(BARE)
    schemas.check(data, schemas.EVALUATION)
    keys = ("semantic", "sr", "sr_ci95", "srcr", "srcr_ci95", "plan_fingerprint")
    assert [data[key] for key in keys] == [None] * len(keys)
    assert (data["tasks"], data["items"]) == ({}, {})
    assert "entropy_bits" not in data["rates"]


def test_a_base_at_chance_has_null_retention_and_a_note():
    score = to_dict(TaskScore(0.25, 0.3, 0.25, 9, None, None, 1.0, 0.1, "acc", "at chance"))
    schemas.check(score, schemas.TASK)
    assert score["retention"] is score["ci95"] is None


def test_a_search_for_a_constraint_writes_it_as_its_target():
    search = replace(SEARCH, target=Constraint(Objective("semantic"), 0.98))
    data = to_dict(search)
    schemas.check(data, schemas.SEARCH)
    assert from_dict(SearchResult, data) == search
