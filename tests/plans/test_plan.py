"""Specs and plans: what they refuse, and that files give back what was written."""

import dataclasses
import hashlib
import json
import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from srcr.errors import InputError
from srcr.plans.plan import CompressionPlan, LayerPlan, Target
from srcr.plans.specs import CompressionLevel, PruneSpec, QuantSpec, SolverSpec
from srcr.plans.structures import StructureSpec
from srcr.serialize import from_dict, from_yaml, to_dict, to_yaml

text = st.text(st.characters(exclude_categories=["C", "Z"]) | st.just(" "), max_size=12)
fractions = st.floats(0, 1, exclude_max=True)
prunes = st.one_of(
    st.builds(PruneSpec, text, fractions),
    st.builds(
        PruneSpec.of, text, fractions, st.sampled_from(["2:4", "6:8", "1:3", "unstructured"])
    ),
)
quants = st.builds(
    QuantSpec,
    text,
    st.integers(2, 8),
    st.just(-1) | st.integers(1, 4096),
    st.booleans(),
    st.sampled_from(["static", None]),
)
solvers = st.builds(
    SolverSpec,
    st.sampled_from(["joint", "sequential-a", "sequential-b"]),
    st.floats(0, 1),
    st.integers(1, 512),
    st.booleans(),
    st.integers(0, 9),
)
targets = st.builds(Target, tcr=fractions) | st.builds(Target, stored_bytes=st.integers(0, 10**13))
plans = st.builds(
    CompressionPlan,
    st.lists(st.builds(LayerPlan, text, st.none() | prunes, st.none() | quants), max_size=4).map(
        tuple
    ),
    st.none() | targets,
    st.integers(),
    solvers,
)


@given(plans)
def test_plans_survive_a_dictionary_json_and_yaml(plan):
    assert from_dict(CompressionPlan, to_dict(plan)) == plan
    assert from_dict(CompressionPlan, json.loads(json.dumps(to_dict(plan)))) == plan
    assert from_dict(CompressionPlan, yaml.safe_load(to_yaml(plan))) == plan


@given(plans)
def test_the_fingerprint_survives_files(plan):
    again = from_dict(CompressionPlan, yaml.safe_load(to_yaml(plan)))
    assert again.fingerprint() == plan.fingerprint()


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(actorder=None),  # None where None is not what a missing key means
        QuantSpec(),
        PruneSpec.of("wanda", 0.9, "2:4"),
        SolverSpec("sequential-b", 1e-5, 1, False, 0),
        LayerPlan("model.layers.0.self_attn.q_proj"),
        Target(loaded_bytes=1),
        CompressionLevel(0.25, 4),
    ],
)
def test_every_spec_survives_a_file(spec, tmp_path):
    for name, written in (("a.yaml", to_yaml(spec)), ("b.json", json.dumps(to_dict(spec)))):
        path = tmp_path / name
        path.write_text(written, encoding="utf-8")
        assert from_yaml(type(spec), path) == spec


def test_what_is_written_is_short_and_plain():
    plan = CompressionPlan((LayerPlan("é", None, QuantSpec()),))
    assert to_dict(plan)["layers"] == [
        {
            "name": "é",
            "quant": {
                "method": "gptq",
                "num_bits": 4,
                "group_size": "auto",
                "symmetric": True,
                "actorder": "static",
            },
        }
    ]
    assert "é" in to_yaml(plan)
    assert "target" not in to_dict(plan)


def test_plans_of_earlier_versions_are_read():
    """They call the solver "sweep"."""
    data = {"layers": [], "sweep": {"mode": "sequential-b"}}
    assert from_dict(CompressionPlan, data).solver == SolverSpec("sequential-b")


def test_missing_keys_take_the_defaults():
    plan = from_dict(CompressionPlan, {"layers": [{"name": "a", "quant": {}, "prune": {}}]})
    assert plan == CompressionPlan((LayerPlan("a", PruneSpec(), QuantSpec()),))


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1.0, 1.5, -0.1, -1e-12, math.nan, math.inf])
def test_sparsity_out_of_range_is_named(value):
    with pytest.raises(InputError, match=f"sparsity {value} is out of range"):
        PruneSpec(sparsity=value)
    with pytest.raises(InputError, match=f"sparsity {value} is out of range"):
        from_dict(PruneSpec, {"sparsity": value})


@pytest.mark.parametrize("value", [0.0, 0.25, 0.999999])
def test_sparsity_in_range(value):
    assert PruneSpec(sparsity=value).sparsity == value


def test_sparsity_must_agree_with_the_pattern():
    with pytest.raises(InputError, match=r"sparsity 0\.3 contradicts 2:4, which gives 0\.5"):
        PruneSpec(sparsity=0.3, mask_structure="2:4")
    with pytest.raises(InputError, match="0:4"):
        PruneSpec(sparsity=0.3, mask_structure="0:4")
    assert PruneSpec.of("wanda", 0.0, "6:8") == PruneSpec("wanda", 0.25, "6:8")
    assert PruneSpec.of("wanda", 0.3) == PruneSpec("wanda", 0.3)
    assert PruneSpec(sparsity=1 - 1 / 3, mask_structure="1:3").sparsity == pytest.approx(2 / 3)


@pytest.mark.parametrize("value", [-1, 0, 1, 9, 16])
def test_bits_out_of_range_are_named(value):
    with pytest.raises(InputError, match=f"num_bits {value} is out of range"):
        QuantSpec(num_bits=value)
    with pytest.raises(InputError, match=f"num_bits {value}"):
        from_dict(LayerPlan, {"name": "a", "quant": {"num_bits": value}})


@pytest.mark.parametrize("value", [0, -2, -128])
def test_group_sizes_out_of_range_are_named(value):
    with pytest.raises(InputError, match=f"group_size {value} must be"):
        QuantSpec(group_size=value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dampening_frac", -0.01),
        ("dampening_frac", 1.01),
        ("dampening_frac", math.nan),
        ("block_size", 0),
        ("block_size", -1),
        ("dense_share", 0),
        ("dense_share", 1.5),
        ("dense_share", math.nan),
        ("descent_rounds", -1),
    ],
)
def test_solver_settings_out_of_range_are_named(field, value):
    with pytest.raises(InputError, match=f"{field} {value} must"):
        SolverSpec(**{field: value})


@pytest.mark.parametrize(
    ("kind", "data", "where"),
    [
        (PruneSpec, {"sparsitee": 0.5}, "sparsitee"),
        (QuantSpec, {"bits": 4}, "bits"),
        (SolverSpec, {"rounds": 4}, "rounds"),
        (Target, {"bytes": 4}, "bytes"),
        (LayerPlan, {"name": "a", "quantize": {}}, "quantize"),
        (CompressionPlan, {"layers": [], "plan": 1}, "plan"),
        (
            CompressionPlan,
            {"layers": [{"name": "a", "quant": {"nbits": 4}}]},
            "layers.0.quant.nbits",
        ),
    ],
)
def test_unknown_keys_are_named(kind, data, where):
    with pytest.raises(InputError) as caught:
        from_dict(kind, data, where="plan.yaml")
    assert f"{where}: Unexpected keyword argument" in str(caught.value)
    assert str(caught.value).startswith(f"plan.yaml does not fit {kind.__name__}")


@pytest.mark.parametrize(
    ("kind", "data", "where"),
    [
        (PruneSpec, {"sparsity": "half"}, "sparsity"),
        (PruneSpec, {"method": 3}, "method"),
        (PruneSpec, {"mask_structure": 124}, "mask_structure"),  # YAML reads a bare 2:4 as 124
        (QuantSpec, {"num_bits": 4.5}, "num_bits"),
        (QuantSpec, {"num_bits": [4]}, "num_bits"),
        (QuantSpec, {"num_bits": None}, "num_bits"),
        (QuantSpec, {"symmetric": "perhaps"}, "symmetric"),
        (QuantSpec, {"actorder": "dynamic"}, "actorder"),
        (SolverSpec, {"mode": "sequential"}, "mode"),
        (LayerPlan, {}, "name"),
        (LayerPlan, {"name": "a", "prune": 0.5}, "prune"),
        (CompressionPlan, {}, "layers"),
        (CompressionPlan, {"layers": {"a": 1}}, "layers"),
        (CompressionPlan, {"layers": ["a"]}, "layers.0"),
        (CompressionPlan, {"layers": [{"name": "a"}, {"name": None}]}, "layers.1.name"),
        (CompressionPlan, {"layers": [], "seed": "x"}, "seed"),
    ],
)
def test_wrong_types_and_missing_keys_are_named(kind, data, where):
    with pytest.raises(InputError) as caught:
        from_dict(kind, data)
    assert f" {where}: " in str(caught.value)


@pytest.mark.parametrize("data", [None, [], "plan", 3])
def test_what_is_no_mapping_is_refused(data):
    with pytest.raises(InputError, match="does not fit CompressionPlan"):
        from_dict(CompressionPlan, data)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"layers: [",
        b"layers:\n\t- name: a",
        b"\xff\xfe\x00binary",
        b"- 1\n- 2",
        b"layers: []\nextra: 1",
        b"!!python/object/apply:os.getcwd []",
        b"layers: 2020-99-99",  # looks like a date, is none
    ],
)
def test_files_that_are_no_plan_are_refused_by_name(tmp_path, content):
    path = tmp_path / "plan.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"plan\.yaml"):
        from_yaml(CompressionPlan, path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*absent\.yaml"):
        from_yaml(CompressionPlan, tmp_path / "absent.yaml")
    with pytest.raises(InputError, match="cannot read"):
        from_yaml(CompressionPlan, tmp_path)


# --- fingerprints ---------------------------------------------------------------------------------

PLAN = CompressionPlan(
    (LayerPlan("a", PruneSpec(), QuantSpec()), LayerPlan("b")), Target(tcr=0.5), 0, SolverSpec()
)
OTHERS = {
    PruneSpec: {"method": "wanda", "sparsity": 0.25, "mask_structure": "2:4"},
    QuantSpec: {
        "method": "rtn", "num_bits": 3, "group_size": 64, "symmetric": False, "actorder": None,
        "scale_dtype": "float16", "scale_bits": 6,
    },
    LayerPlan: {"name": "c", "prune": None, "quant": None},
    SolverSpec: {
        "mode": "sequential-a", "dampening_frac": 0.1, "block_size": 64, "dense_targets": False,
        "dense_share": 0.5, "descent_rounds": 1, "expert_prior": 0.1, "expert_gates": True,
    },
    Target: {"tcr": 0.6, "stored_bytes": 1, "loaded_bytes": 1},
    CompressionPlan: {
        "layers": PLAN.layers[::-1], "target": None, "seed": 1, "solver": SolverSpec("sequential-b"),
        "embeddings": (LayerPlan("e", None, QuantSpec(num_bits=8)),),
        "structures": StructureSpec(channels=0.25),
    },
}  # fmt: skip


def replaced(kind, field, value):
    """The plan with one field changed, wherever in it that field is."""
    change = {field: value}
    layer = PLAN.layers[0]
    if kind is CompressionPlan:
        return dataclasses.replace(PLAN, **change)
    if kind is SolverSpec:
        return dataclasses.replace(PLAN, solver=dataclasses.replace(PLAN.solver, **change))
    if kind is Target:
        return dataclasses.replace(PLAN, target=Target(**change))
    if kind is PruneSpec:
        layer = dataclasses.replace(layer, prune=dataclasses.replace(layer.prune, **change))
    elif kind is QuantSpec:
        # Scales in units of super-blocks need a group size of their own.
        quant = (
            dataclasses.replace(layer.quant, group_size=16)
            if "scale_bits" in change
            else layer.quant
        )
        layer = dataclasses.replace(layer, quant=dataclasses.replace(quant, **change))
    else:
        layer = dataclasses.replace(layer, **change)
    return dataclasses.replace(PLAN, layers=(layer, PLAN.layers[1]))


@pytest.mark.parametrize("kind", OTHERS)
def test_every_field_changes_the_fingerprint(kind):
    fields = {field.name for field in dataclasses.fields(kind)}
    assert fields == set(OTHERS[kind]), "a field was added: say here what else it can be"
    prints = {replaced(kind, field, value).fingerprint() for field, value in OTHERS[kind].items()}
    assert len(prints | {PLAN.fingerprint()}) == len(fields) + 1


def test_the_fingerprint_depends_on_the_plan_alone():
    again = CompressionPlan(
        (LayerPlan("a", PruneSpec(), QuantSpec()), LayerPlan("b")), Target(tcr=0.5)
    )
    assert again is not PLAN
    assert again.fingerprint() == PLAN.fingerprint()
    assert len(PLAN.fingerprint()) == 16
    int(PLAN.fingerprint(), 16)


def test_the_fingerprint_is_the_same_in_every_process():
    """A resumed run compares it with one that another process wrote."""
    plan = CompressionPlan((), None, 7, SolverSpec())
    written = (
        '{"layers":[],"seed":7,"solver":{"block_size":128,"dampening_frac":0.01,'
        '"dense_targets":true,"descent_rounds":2,"mode":"joint"}}'
    )
    assert plan.fingerprint() == hashlib.sha256(written.encode()).hexdigest()[:16]


def test_batches_that_the_dense_model_runs_on():
    assert SolverSpec(dense_share=1.0).dense_batches(5, 5000, 100) == 5
    assert SolverSpec(dense_share=0.5).dense_batches(5, 5000, 100) == 3
    assert SolverSpec(dense_share=0.01).dense_batches(5, 5000, 10_000) == 1
    assert SolverSpec(dense_targets=False).dense_batches(5, 5000, 100) == 0


def test_the_dense_model_runs_on_a_quarter_or_on_eight_tokens_an_input():
    assert SolverSpec().dense_batches(8, 65536, 300) == 2
    assert SolverSpec().dense_batches(8, 65536, 2048) == 2
    assert SolverSpec().dense_batches(8, 65536, 3072) == 3
    assert SolverSpec().dense_batches(8, 65536, 8192) == 8
    assert SolverSpec().dense_batches(1, 2048, 8192) == 1


@pytest.mark.parametrize("given", [{}, {"tcr": 0.5, "stored_bytes": 1}])
def test_a_target_is_exactly_one_size(given):
    with pytest.raises(InputError, match="exactly one"):
        Target(**given)


@pytest.mark.parametrize("text", ["structure: 2:4", "structure: '2:4'"])
def test_a_structure_needs_no_quotes_in_yaml(tmp_path, text):
    (tmp_path / "run.yaml").write_text(f"{text}\nsparsity: 5e-1\nseed: 12\n")
    options = from_yaml(dict, tmp_path / "run.yaml")
    assert options == {"structure": "2:4", "sparsity": 0.5, "seed": 12}


def test_layers_by_name():
    assert PLAN.by_name() == {"a": PLAN.layers[0], "b": PLAN.layers[1]}
    assert PLAN.layers[0].bits == 4
    assert PLAN.layers[0].sparsity == 0.5
    assert PLAN.layers[1].bits == 16
    assert PLAN.layers[1].sparsity == 0


@pytest.mark.parametrize(
    "value", [PLAN, PruneSpec(), QuantSpec(), SolverSpec(), Target(tcr=0.5), LayerPlan("a")]
)
def test_specs_cannot_be_changed(value):
    field = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field, None)
    assert hash(value) == hash(dataclasses.replace(value))
