"""Options: from the command line, from a file, or the defaults, in that order."""

import pytest

from srcr.cli.options import DECIDED_BY_A_PLAN, DECIDED_BY_A_TABLE, Options
from srcr.data.specs import Calibration
from srcr.errors import InputError
from srcr.pipelines.options import RunOptions
from srcr.plans.plan import CompressionPlan, LayerPlan, Recipe
from srcr.plans.specs import CompressionLevel, Override, PruneSpec, QuantSpec, SolverSpec
from srcr.plans.structures import STRUCTURES, StructureSpec
from srcr.serialize import from_dict, to_yaml


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def test_the_defaults_are_those_of_the_design():
    recipe = Options().compression()
    assert recipe == Recipe(None, QuantSpec("gptq", 4, "auto", True, "static"), SolverSpec())
    assert recipe.solver.mode == "joint"
    assert Options(sparsity=0.25).compression().prune == PruneSpec(
        "sparsegpt", 0.25, "unstructured"
    )
    assert Options().data() == Calibration("self", None, 512)


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("symmetric", [None, True, False])
def test_quantization_options(bits, symmetric):
    quant = (
        Options(bits=bits, symmetric=symmetric, quant_method="rtn", group_size="32")
        .compression()
        .quant
    )
    assert quant == QuantSpec("rtn", bits, 32, symmetric is not False)


def test_16_bits_quantize_nothing():
    assert Options(bits=16).compression().quant is None
    assert Options(bits=16, sparsity=0.5).compression().prune == PruneSpec("sparsegpt", 0.5)


def test_no_sparsity_prunes_nothing():
    assert Options(sparsity=0.0).compression().prune is None


@pytest.mark.parametrize(("structure", "sparsity"), [("2:4", 0.5), ("6:8", 0.25), ("1:4", 0.75)])
def test_sparsity_follows_from_the_structure(structure, sparsity):
    for given in (None, sparsity):
        prune = Options(structure=structure, sparsity=given).compression().prune
        assert prune == PruneSpec("sparsegpt", sparsity, structure)


@pytest.mark.parametrize("sparsity", [0.0, 0.3])
def test_sparsity_that_contradicts_the_structure(sparsity):
    with pytest.raises(InputError, match="contradicts 2:4"):
        Options(structure="2:4", sparsity=sparsity).compression()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_whole_structures_have_an_option_of_their_own(structure):
    with pytest.raises(InputError, match=f"use --remove {structure}"):
        Options(structure=structure).compression()


def test_remove_is_a_text_or_a_mapping():
    expected = StructureSpec(channels=0.25, layers=2)
    for given in ("channels=0.25,layers=2", {"channels": 0.25, "layers": 2}):
        assert Options(remove=given).compression().structures == expected
    with pytest.raises(InputError, match="remove is for 'srcr compress'"):
        Options(remove="layers=1").space()


@pytest.mark.parametrize("size", ["auto", None])
def test_group_size_auto(size):
    assert Options(group_size=size).compression().quant.group_size == "auto"


@pytest.mark.parametrize(("size", "expected"), [("-1", -1), (-1, -1), ("64", 64), (64, 64)])
def test_group_size_as_text_or_number(size, expected):
    assert Options(group_size=size).compression().quant.group_size == expected


@pytest.mark.parametrize("size", ["0", "-2", "x", "1.5", "", 0])
def test_group_sizes_that_cannot_be(size):
    with pytest.raises(InputError, match=r"group size .*: use auto"):
        Options(group_size=size).compression()


def test_the_solver_is_passed_on():
    options = Options(
        mode="sequential-b", dampening_frac=0.1, dense_targets=False, descent_rounds=0
    )
    expected = SolverSpec(
        mode="sequential-b", dampening_frac=0.1, dense_targets=False, descent_rounds=0
    )
    assert options.compression().solver == expected


def test_the_command_line_wins_over_the_file(config):
    path = config("bits: 3\nsparsity: 0.5\nsamples: 7\nsymmetric: false\nseed: 4\n")
    merged = Options.of({"bits": 5, "symmetric": True, "samples": None}, path)
    assert merged == Options(bits=5, sparsity=0.5, samples=7, symmetric=True, seed=4)


def test_a_zero_on_the_command_line_wins_as_well(config):
    path = config("sparsity: 0.5\nseed: 4\ndense_targets: true\n")
    merged = Options.of({"sparsity": 0.0, "seed": 0, "dense_targets": False}, path)
    assert merged == Options(sparsity=0.0, seed=0, dense_targets=False)


def test_arguments_that_are_no_options_are_left_alone():
    assert Options.of({"bits": 3, "as_json": True}, None) == Options(bits=3)


def test_json_is_a_config_as_well(config):
    options = Options.of({}, config('{"bits": 3, "group_size": 64}'))
    assert options.compression().quant.num_bits == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bitz: 3", "bitz"),
        ("bits: many", "bits"),
        ("mode: both", "mode"),
        ("- 1", "does not fit Options"),
        ("a: [", "not valid YAML"),
    ],
)
def test_files_that_do_not_fit(config, text, message):
    path = config(text)
    with pytest.raises(InputError, match=message) as caught:
        Options.of({}, path)
    assert str(path) in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        Options.of({}, tmp_path / "nowhere.yaml")


class TestPlan:
    @pytest.fixture
    def path(self, tmp_path):
        plan = CompressionPlan((LayerPlan("a", PruneSpec(), QuantSpec(num_bits=3)),), seed=3)
        (tmp_path / "plan.yaml").write_text(to_yaml(plan))
        return str(tmp_path / "plan.yaml")

    def test_it_is_read(self, path):
        plan = Options(plan=path, samples=3, seed=1).compression()
        assert plan.layers[0].quant.num_bits == 3
        assert plan.seed == 3

    @pytest.mark.parametrize("name", DECIDED_BY_A_PLAN)
    def test_what_it_decides_may_not_be_given_beside_it(self, path, name):
        values = {
            "sparsity": 0.0, "structure": "2:4", "bits": 4, "group_size": "auto", "symmetric": False,
            "prune_method": "wanda", "quant_method": "rtn", "mode": "joint", "dampening_frac": 0.0,
            "dense_targets": False, "dense_share": 0.5, "descent_rounds": 0, "targets": ["a"],
            "expert_prior": 10.0, "expert_gates": True,
            "ignore": "a", "overrides": {"a": Override(bits=3)}, "embeddings": 8,
            "remove": "layers=1",
        }  # fmt: skip
        with pytest.raises(InputError, match=f"leave --{name.replace('_', '-')} out"):
            Options(plan=path, **{name: values[name]}).compression()

    def test_a_file_without_layers_is_a_recipe(self, tmp_path):
        recipe = Recipe(
            None, QuantSpec(num_bits=3), ignore=("a",), overrides={"b": Override(sparsity=0.5)},
            embeddings=QuantSpec(num_bits=8),
        )  # fmt: skip
        (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
        assert Options(plan=str(tmp_path / "recipe.yaml")).compression() == recipe


class TestSomeLayers:
    def test_patterns_once_or_several_times_or_from_the_file(self, config):
        path = config(
            "targets: 'a*'\nignore: [b, 're:c']\noverrides: {'*.d': {bits: 6, sparsity: 0}}\n"
        )
        recipe = Options.of({"targets": [], "ignore": None}, path).compression()
        assert (recipe.targets, recipe.ignore) == (("a*",), ("b", "re:c"))
        assert recipe.overrides == {"*.d": Override(bits=6, sparsity=0)}
        assert Options.of({"ignore": ["x", "y"]}, path).compression().ignore == ("x", "y")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("overrides: {a: {bitz: 3}}", "bitz"),
            ("overrides: [a]", "overrides"),
            ("ignore: 3", "ignore"),
        ],
    )
    def test_what_does_not_fit_is_named(self, config, text, message):
        with pytest.raises(InputError, match=message):
            Options.of({}, config(text))

    def test_embeddings(self):
        quant = (
            Options(bits=3, embeddings=8, group_size=64, symmetric=False).compression().embeddings
        )
        assert quant == QuantSpec("gptq", 8, 64, False, None)
        assert Options(embeddings=16).compression().embeddings is None
        assert Options(bits=16, embeddings=8).compression().quant is None
        for bits in (3, 9, 0):
            with pytest.raises(InputError, match=f"embeddings {bits}: use 4 to 8"):
                Options(embeddings=bits).compression()


@pytest.mark.parametrize(
    "given",
    [{"bits": "4.5"}, {"samples": 1.5}, {"symmetric": "perhaps"}, {"mode": "x"}, {"other": 1}],
)
def test_values_of_another_type_are_refused(given):
    with pytest.raises(InputError, match=next(iter(given))):
        from_dict(Options, given, "the command line")


class TestSpace:
    def test_numbers_are_separated_by_commas(self):
        options = Options.of({"sparsities": "0, 0.25", "widths": "3,4"}, None)
        expected = {CompressionLevel(s, q) for s in (0.0, 0.25) for q in (3, 4)}
        assert set(options.space().levels) == expected

    @pytest.mark.parametrize(("name", "text"), [("sparsities", "0;1"), ("widths", "3.5")])
    def test_what_is_no_number_is_named(self, name, text):
        with pytest.raises(InputError, match=f"--{name} '{text}': give numbers"):
            Options.of({name: text}, None)

    @pytest.mark.parametrize("name", ["sparsity", "structure", "bits", "plan"])
    def test_options_for_all_layers_are_refused(self, name):
        with pytest.raises(InputError, match=f"--{name} is for one treatment"):
            Options.of({name: {"sparsity": 0.5, "bits": 3}.get(name, "x")}, None).space()

    @pytest.mark.parametrize("name", ["targets", "ignore", "overrides", "embeddings"])
    def test_what_only_compress_does_is_refused(self, name):
        value = {"overrides": {"a": Override(bits=3)}, "embeddings": 8}.get(name, "a")
        with pytest.raises(InputError, match=f"{name} is for 'srcr compress'"):
            Options(**{name: value}).space()

    @pytest.mark.parametrize("name", DECIDED_BY_A_TABLE)
    def test_what_a_table_decides_may_not_be_given_beside_it(self, name):
        values = {
            "sparsities": "0.5", "widths": "3", "group_size": "64", "symmetric": False,
            "prune_method": "wanda", "quant_method": "rtn",
        }  # fmt: skip
        Options.of({"bits": 3}, None).check_table()
        with pytest.raises(InputError, match=f"--table decides {name.replace('_', '-')}"):
            Options.of({name: values[name]}, None).check_table()


def test_how_a_run_goes():
    options = Options.of({"seed": 3, "memory": "4GB"}, None)
    assert options.run("srcr x") == RunOptions(3, "auto", "4GB", command="srcr x")
