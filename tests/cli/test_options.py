"""Options: from the command line, from a file, or the defaults, in that order."""

from pathlib import Path

import pytest
import typer
import yaml

import srcr.cli.process  # noqa: F401 - registers the commands
from srcr.cli.app import app
from srcr.cli.config import DECIDED_BY_A_PLAN
from srcr.cli.options import (
    DECIDED_BY_A_TABLE,
    calibration_of,
    check_table,
    compression_of,
    run_of,
    space_of,
)
from srcr.cli.recover_command import recovery_spec
from srcr.data.specs import Calibration
from srcr.errors import InputError
from srcr.pipelines.options import RunOptions
from srcr.plans.plan import CompressionPlan, LayerPlan, Recipe
from srcr.plans.specs import CompressionLevel, Override, PruneSpec, QuantSpec, SolverSpec
from srcr.plans.structures import STRUCTURES, StructureSpec
from srcr.serialize import to_yaml


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def parsed(*words, command="compress"):
    """The options that a command line gives, by name."""
    known = typer.main.get_command(app).commands[command]
    context = known.make_context(command, [str(word) for word in words])
    return {n: v for n, v in context.params.items() if v not in (None, (), []) and n != "config"}


def test_the_defaults_are_those_of_the_design():
    recipe = compression_of({})
    assert recipe == Recipe(None, QuantSpec("gptq", 4, "auto", True, "static"), SolverSpec())
    assert recipe.solver.mode == "joint"
    assert compression_of({"sparsity": 0.25}).prune == PruneSpec("sparsegpt", 0.25, "unstructured")
    assert calibration_of({}) == Calibration("self", None, 512)


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("given", [{}, {"symmetric": True}, {"symmetric": False}])
def test_quantization_options(bits, given):
    quant = compression_of({"bits": bits, "quant_method": "rtn", "group_size": "32"} | given).quant
    assert quant == QuantSpec("rtn", bits, 32, given.get("symmetric", True))


def test_16_bits_quantize_nothing():
    assert compression_of({"bits": 16}).quant is None
    assert compression_of({"bits": 16, "sparsity": 0.5}).prune == PruneSpec("sparsegpt", 0.5)


def test_no_sparsity_prunes_nothing():
    assert compression_of({"sparsity": 0.0}).prune is None


@pytest.mark.parametrize(("structure", "sparsity"), [("2:4", 0.5), ("6:8", 0.25), ("1:4", 0.75)])
def test_sparsity_follows_from_the_structure(structure, sparsity):
    for given in ({}, {"sparsity": sparsity}):
        prune = compression_of({"structure": structure} | given).prune
        assert prune == PruneSpec("sparsegpt", sparsity, structure)


@pytest.mark.parametrize("sparsity", [0.0, 0.3])
def test_sparsity_that_contradicts_the_structure(sparsity):
    with pytest.raises(InputError, match="contradicts 2:4"):
        compression_of({"structure": "2:4", "sparsity": sparsity})


@pytest.mark.parametrize("structure", STRUCTURES)
def test_whole_structures_have_an_option_of_their_own(structure):
    with pytest.raises(InputError, match=f"use --remove {structure}"):
        compression_of({"structure": structure})


def test_remove_is_a_text_or_a_mapping():
    expected = StructureSpec(channels=0.25, layers=2)
    for given in ("channels=0.25,layers=2", {"channels": 0.25, "layers": 2}):
        assert compression_of({"remove": given}).structures == expected


def test_group_size_auto():
    assert compression_of({"group_size": "auto"}) == compression_of({})


@pytest.mark.parametrize(("size", "expected"), [("-1", -1), (-1, -1), ("64", 64), (64, 64)])
def test_group_size_as_text_or_number(size, expected):
    assert compression_of({"group_size": size}).quant.group_size == expected


@pytest.mark.parametrize("size", ["0", "-2", "x", "1.5", "", 0])
def test_group_sizes_that_cannot_be(size):
    with pytest.raises(InputError, match=r"group size .*: use auto"):
        compression_of({"group_size": size})


def test_the_solver_is_passed_on():
    given = {
        "mode": "sequential-b", "dampening_frac": 0.1, "dense_targets": False, "descent_rounds": 0
    }  # fmt: skip
    assert compression_of(given).solver == SolverSpec(**given)


class TestConfig:
    PLACES = ("m", "-o", "out")

    def test_the_command_line_wins_over_the_file(self, config):
        path = config("bits: 3\nsparsity: 0.5\nsamples: 7\nsymmetric: false\nseed: 4\n")
        options = parsed(*self.PLACES, "--bits", 5, "--symmetric", "--config", path)
        places = {"model": "m", "out": Path("out")}
        expected = {"bits": 5, "sparsity": 0.5, "samples": 7, "symmetric": True, "seed": 4}
        assert options == expected | places

    @pytest.mark.parametrize(
        ("command", "text", "typed", "gone"),
        [
            ("recover", "steps: 5", ("--minutes", 1), {"steps"}),
            ("recover", "minutes: 5", ("--steps", 1), {"minutes"}),
            ("search", "target: tcr=0.8", ("--constraint", "kl<=0.1"), {"target"}),
            ("search", "constraint: kl<=0.1", ("--target", "tcr=0.8"), {"constraint"}),
            ("compress", "bits: 3\nignore: a", ("--plan", "p"), {"bits", "ignore"}),
            ("compress", "plan: p", ("--bits", 3), set()),
        ],
    )
    def test_what_is_typed_stands_for_what_says_the_same(
        self, config, monkeypatch, command, text, typed, gone
    ):
        monkeypatch.setattr("srcr.cli.app.TyperCommand.invoke", lambda _, ctx: ctx.params)
        known = typer.main.get_command(app).commands[command]
        places = ("base", "m", "-o", "out") if command == "recover" else self.PLACES
        words = [str(word) for word in (*places, "--config", config(text), *typed)]
        given = known.invoke(known.make_context(command, words))
        assert given[typed[0][2:]] is not None
        assert {name for name in yaml.safe_load(text) if given[name] is None} == gone

    def test_a_zero_on_the_command_line_wins_as_well(self, config):
        path = config("sparsity: 0.5\nseed: 4\ndense_targets: true\n")
        given = ("--sparsity", 0, "--seed", 0, "--no-dense-targets")
        options = parsed("--config", path, *self.PLACES, *given)
        assert (options["sparsity"], options["seed"], options["dense_targets"]) == (0, 0, False)

    @pytest.mark.parametrize(
        ("command", "text", "expected"),
        [
            ("compress", "model: m\nout: o", {"model": "m", "out": Path("o")}),
            ("search", "model: m\nout: o\nwidths: [3, 4]\nremove: [layers=1, heads=1]",
             {"widths": "3,4", "remove": ["layers=1", "heads=1"]}),
            ("search", "model: m\nout: o\nsparsities: 0.5\ntarget: tcr=0.8", {"sparsities": "0.5"}),
            ("recover", "base: m\ncompressed: c\nout: o\ncalibration: [a, self]\nlr: 1.0e-3",
             {"compressed": "c", "calibration": ["a", "self"], "lr": 1e-3}),
            ("recover", "base: m\ncompressed: c\nout: o\ncalibration: a", {"calibration": ["a"]}),
            ("evaluate", "base: m\ncompressed: [a, b]\nsemantic: true\nreport: true",
             {"compressed": ["a", "b"], "semantic": True, "report": True}),
            ("plan", "model: m\ntarget: tcr=0.8", {"model": "m", "target": "tcr=0.8"}),
            ("sensitivity", "model: m\nout: t.json\nprobes: 2", {"probes": 2}),
        ],
    )  # fmt: skip
    def test_a_file_is_a_whole_run(self, config, command, text, expected):
        options = parsed("--config", config(text), command=command)
        assert {name: options.get(name) for name in expected} == expected

    def test_json_is_a_config_as_well(self, config):
        path = config('{"bits": 3, "group_size": 64, "remove": {"channels": 0.25, "layers": 2}}')
        recipe = compression_of(recipe_options(parsed(*self.PLACES, "--config", path)))
        assert (recipe.quant.num_bits, recipe.quant.group_size) == (3, 64)
        assert recipe.structures == StructureSpec(channels=0.25, layers=2)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("bitz: 3", "bitz is no option of 'srcr compress', did you mean bits"),
            ("config: a.yaml", "config is no option"),
            ("zzz: 3", "zzz is no option of 'srcr compress': see its --help"),
            ("bits: many", "bits 'many': "),
            ("bits: true", "bits True: "),
            ("samples: 1.5", "samples 1.5: "),
            ("symmetric: perhaps", "symmetric 'perhaps': "),
            ("mode: both", "--mode 'both' is not known"),
            ("- 1", "is no config file"),
            ("a: [", "not valid YAML"),
            ("overrides: [a]", "'a' is no mapping"),
        ],
    )
    def test_files_that_do_not_fit(self, config, text, message):
        path = config(text)
        with pytest.raises(InputError, match=message) as caught:
            parsed(*self.PLACES, "--config", path)
        assert str(path) in str(caught.value)

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(InputError, match="cannot read"):
            parsed(*self.PLACES, "--config", tmp_path / "nowhere.yaml")

    @pytest.mark.parametrize("name", ["plan", "table"])
    def test_what_lies_beside_it(self, config, name, tmp_path):
        (tmp_path / "near.yaml").write_text("")
        command = {"plan": "compress", "table": "plan"}[name]
        places = ("m", "-o", "out", "--config", config(f"{name}: near.yaml"))
        assert parsed(*places, command=command)[name] == tmp_path / "near.yaml"
        places = ("m", "-o", "out", "--config", config(f"{name}: far.yaml"))
        assert parsed(*places, command=command)[name] == Path("far.yaml")

    def test_patterns_once_or_several_times(self, config):
        path = config(
            "targets: 'a*'\nignore: [b, 're:c']\noverrides: {'*.d': {bits: 6, sparsity: 0}}\n"
        )
        recipe = compression_of(recipe_options(parsed(*self.PLACES, "--config", path)))
        assert (recipe.targets, recipe.ignore) == (("a*",), ("b", "re:c"))
        assert recipe.overrides == {"*.d": Override(bits=6, sparsity=0)}
        more = ("--ignore", "x", "--ignore", "y", "--config", path)
        assert parsed(*self.PLACES, *more)["ignore"] == ["x", "y"]


def recipe_options(options):
    return {name: value for name, value in options.items() if name not in ("model", "out")}


def test_overrides_of_an_unknown_setting():
    with pytest.raises(InputError, match="bitz"):
        compression_of({"overrides": {"a": {"bitz": 3}}})


class TestPlan:
    @pytest.fixture
    def path(self, tmp_path):
        plan = CompressionPlan((LayerPlan("a", PruneSpec(), QuantSpec(num_bits=3)),), seed=3)
        (tmp_path / "plan.yaml").write_text(to_yaml(plan))
        return str(tmp_path / "plan.yaml")

    def test_it_is_read(self, path):
        plan = compression_of({"plan": path, "samples": 3, "seed": 1})
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
            compression_of(dict(plan=path, **{name: values[name]}))

    def test_a_file_without_layers_is_a_recipe(self, tmp_path):
        recipe = Recipe(
            None, QuantSpec(num_bits=3), ignore=("a",), overrides={"b": Override(sparsity=0.5)},
            embeddings=QuantSpec(num_bits=8),
        )  # fmt: skip
        (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
        assert compression_of({"plan": str(tmp_path / "recipe.yaml")}) == recipe


class TestSomeLayers:
    def test_embeddings(self):
        quant = compression_of(
            {"bits": 3, "embeddings": 8, "group_size": 64, "symmetric": False}
        ).embeddings
        assert quant == QuantSpec("gptq", 8, 64, False, None)
        assert compression_of({"embeddings": 16}).embeddings is None
        assert compression_of({"bits": 16, "embeddings": 8}).quant is None
        for bits in (3, 9, 0):
            with pytest.raises(InputError, match=f"embeddings {bits}: use 4 to 8"):
                compression_of({"embeddings": bits})


@pytest.mark.parametrize(
    "given", [{"bits": "4.5"}, {"symmetric": "perhaps"}, {"mode": "x"}, {"dense_share": "all"}]
)
def test_values_of_another_type_are_refused(given):
    with pytest.raises(InputError, match=next(iter(given))):
        compression_of(given)


def test_every_setting_is_an_option_of_compress():
    known = {each.name for each in typer.main.get_command(app).commands["compress"].params}
    assert set(DECIDED_BY_A_PLAN) <= known


class TestSpace:
    def test_numbers_are_separated_by_commas(self):
        expected = {CompressionLevel(s, q) for s in (0.0, 0.25) for q in (3, 4)}
        assert set(space_of({"sparsities": "0, 0.25", "widths": "3,4"}).levels) == expected

    @pytest.mark.parametrize(("name", "text"), [("sparsities", "0;1"), ("widths", "3.5")])
    def test_what_is_no_number_is_named(self, name, text):
        with pytest.raises(InputError, match=f"--{name} '{text}': give numbers"):
            space_of({name: text})

    @pytest.mark.parametrize("name", ["sparsity", "structure", "bits", "overrides", "mode"])
    def test_what_only_compress_does_is_refused(self, config, name):
        path = config(f"{name}: 1")
        for command in ("search", "plan", "sensitivity"):
            with pytest.raises(InputError, match=f"{name} is no option of 'srcr {command}'"):
                parsed("m", "-o", "out", "--config", path, command=command)

    @pytest.mark.parametrize("name", DECIDED_BY_A_TABLE)
    def test_what_a_table_decides_may_not_be_given_beside_it(self, name):
        values = {
            "sparsities": "0.5", "widths": "3", "group_size": "64", "symmetric": False,
            "prune_method": "wanda", "quant_method": "rtn", "targets": ["a"], "ignore": ["a"],
            "embeddings": 8, "calibration": "self", "samples": 8, "seq_len": 64, "chat": True,
        }  # fmt: skip
        check_table({"target": "tcr=0.8"})
        with pytest.raises(InputError, match=f"--table decides {name.replace('_', '-')}"):
            check_table({name: values[name]})


def test_a_training_has_one_end():
    with pytest.raises(InputError, match="--minutes 2 and --steps 5 both end the training"):
        recovery_spec({"minutes": 2.0, "steps": 5})
    assert recovery_spec({"steps": 5}).minutes is None


def test_how_a_run_goes(monkeypatch):
    monkeypatch.setattr("sys.argv", ["srcr", "x"])
    expected = RunOptions(3, "auto", "4GB", command="srcr x")
    assert run_of({"seed": 3, "memory": "4GB", "bits": 3}) == expected
