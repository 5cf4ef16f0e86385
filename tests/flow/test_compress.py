"""srcr compress with the options people use, on tiny models of every family."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from srcr import formats
from srcr.models.checkpoint import open_model
from srcr.models.matrices import read_matrix
from srcr.plans.plan import Recipe
from srcr.plans.resolve import uniform_plan
from srcr.plans.specs import QuantSpec
from srcr.serialize import to_yaml
from srcr.testing import FAMILIES, save_tiny_model, tiny_model

pytestmark = pytest.mark.slow


def weight_bytes(folder):
    return (folder / "model.safetensors").read_bytes()


def block_linears(folder):
    """Every linear of the blocks, [out, in], as transformers loads it."""
    model = formats.load(folder)
    matrices = open_model(model).topology.matrices
    return {name: read_matrix(model, ref).detach() for name, ref in matrices.items()}


def zeros(weights):
    total = sum(weight.numel() for weight in weights.values())
    return sum(int((weight == 0).sum()) for weight in weights.values()) / total


@pytest.mark.parametrize("family", FAMILIES)
def test_no_option_at_all(family, srcr, tmp_path):
    """A model folder and a name for the result is all that is needed, whatever the family; where so many
    samples as the default has would only take time, there are fewer."""
    base = save_tiny_model(tmp_path / family, family)
    out = tmp_path / "out"
    samples = 128 if family == "llama" else 8
    fewer = [] if samples == 128 else ["--samples", samples]
    result = srcr("compress", base, "-o", out, *fewer)
    assert result.code == 0, result.err
    record = json.loads((out / "srcr.json").read_text())
    packed = family != "gpt2"
    assert record["format"] == ("compressed-tensors" if packed else "dense")
    source = (record["calibration"]["source"], record["calibration"]["samples"])
    assert source == ("self", samples)
    assert record["calibration"]["seq_len"] == 64  # these models' context, not the default 512
    assert (record["rates"]["bits"], record["rates"]["sparsity"]) == (4, 0)
    assert record["rates"]["tcr"] == 0.75
    assert any("group size auto" in note for note in record["notes"])
    assert any("dense" in note for note in record["notes"]) == (not packed)
    plan = yaml.safe_load((out / "plan.yaml").read_text())
    assert {layer["quant"]["method"] for layer in plan["layers"]} == {"gptq"}
    base_weights, weights = block_linears(base), block_linears(out)
    assert set(weights) == set(base_weights)
    for name, weight in weights.items():
        assert max(len(row.unique()) for row in weight) <= 16
        assert float((weight - base_weights[name]).norm() / base_weights[name].norm()) < 0.3, name
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert model.generate(torch.tensor([[1, 5]]), max_new_tokens=4, do_sample=False).shape[1] <= 6


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_bfloat16_model_stays_one(family, srcr, ids, tmp_path):
    base = save_tiny_model(tmp_path / "base", family, torch.bfloat16)
    result = srcr("compress", base, "-o", tmp_path / "out", "--calibration", ids)
    assert result.code == 0, result.err
    for weight in block_linears(tmp_path / "out").values():
        assert weight.dtype == torch.bfloat16
        assert max(len(row.unique()) for row in weight) <= 16


@pytest.mark.parametrize(
    ("options", "pruned", "values", "format_name"),
    [
        (["--bits", 16, "--sparsity", 0.5], 0.5, None, "dense"),
        (["--bits", 16], 0, None, "dense"),
        (["--structure", "2:4", "--bits", 4], 0.5, 16, "compressed-tensors"),
        (["--structure", "6:8", "--bits", 8], 0.25, 256, "compressed-tensors"),
        (["--sparsity", 0.25, "--mode", "sequential-a"], 0.25, 16, "compressed-tensors"),
        (["--sparsity", 0.25, "--mode", "sequential-b"], 0.25, 16, "compressed-tensors"),
        (["--sparsity", 0.5, "--prune-method", "wanda", "--quant-method", "rtn", "--bits", 3],
         0.5, 8, "compressed-tensors"),
        (["--sparsity", 0.3, "--asymmetric", "--bits", 2], 0.3, 4, "compressed-tensors"),
        (["--asymmetric", "--format", "dense", "--bits", 5], 0, 32, "dense"),
        (["--bits", 3, "--group-size", -1], 0, 8, "compressed-tensors"),
    ],
)  # fmt: skip
def test_what_is_asked_for_is_what_comes_out(
    options, pruned, values, format_name, srcr, tiny, ids, tmp_path
):
    out = tmp_path / "out"
    result = srcr("compress", tiny, "-o", out, "--calibration", ids, *options)
    assert result.code == 0, result.err
    record = json.loads((out / "srcr.json").read_text())
    weights = block_linears(out)
    assert record["format"] == format_name
    assert record["rates"]["sparsity"] == pytest.approx(pruned, abs=1e-3)
    assert record["rates"]["zeros"] == pytest.approx(zeros(weights), abs=1e-12)
    for weight in weights.values():
        assert int((weight == 0).sum()) >= round(pruned * weight.numel())
        if values is not None:
            assert max(len(row.unique()) for row in weight) <= values
    if "--structure" in options:
        keep, group = map(int, options[1].split(":"))
        for weight in weights.values():
            kept = (weight != 0).view(weight.shape[0], -1, group).sum(-1)
            assert int(kept.max()) <= keep
    if options == ["--bits", 16]:
        base = block_linears(tiny)
        assert all(torch.equal(weights[name], base[name]) for name in base)


def test_groups_of_16(srcr, tiny, ids, tmp_path):
    out = tmp_path / "out"
    result = srcr(
        "compress", tiny, "-o", out, "--calibration", ids, "--bits", 2, "--group-size", 16
    )
    assert result.code == 0, result.err
    for weight in block_linears(out).values():
        groups = weight.reshape(-1, 16)
        assert max(len(group.unique()) for group in groups) <= 4


def test_the_same_run_gives_the_same_bytes_and_another_seed_others(srcr, tiny, tmp_path):
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        options = ["--samples", 4, "--seq-len", 32, "--seed", seed]
        assert srcr("compress", tiny, "-o", tmp_path / name, *options).code == 0
    first, again, other = (weight_bytes(tmp_path / name) for name in ("first", "again", "other"))
    assert first == again
    assert first != other
    plans = [(tmp_path / name / "plan.yaml").read_text() for name in ("first", "again")]
    assert plans[0] == plans[1]


class TestPlan:
    DATA = ("--samples", 4, "--seq-len", 32)

    def test_a_run_is_repeated_from_its_plan(self, srcr, tiny, tmp_path):
        options = [
            "--sparsity", 0.3, "--bits", 3, "--asymmetric", "--mode", "sequential-a",
            "--prune-method", "wanda", "--seed", 5,
        ]  # fmt: skip
        first = srcr("compress", tiny, "-o", tmp_path / "one", *options, *self.DATA)
        assert first.code == 0, first.err
        plan = tmp_path / "one/plan.yaml"
        second = srcr("compress", tiny, "-o", tmp_path / "two", "--plan", plan, *self.DATA)
        assert second.code == 0, second.err
        assert weight_bytes(tmp_path / "one") == weight_bytes(tmp_path / "two")
        assert plan.read_text() == (tmp_path / "two/plan.yaml").read_text()
        records = [
            json.loads((tmp_path / name / "srcr.json").read_text()) for name in ("one", "two")
        ]
        assert records[0]["plan_fingerprint"] == records[1]["plan_fingerprint"]
        assert records[0]["rates"] == records[1]["rates"]
        assert records[0]["calibration"] == records[1]["calibration"]

    def test_an_edited_plan_treats_layers_differently(self, srcr, tiny, tmp_path, ids):
        assert srcr("compress", tiny, "-o", tmp_path / "one", "--calibration", ids).code == 0
        plan = yaml.safe_load((tmp_path / "one/plan.yaml").read_text())
        first, second, *_ = plan["layers"]
        del first["quant"]
        second["quant"]["num_bits"] = 2
        second["prune"] = {"method": "magnitude", "sparsity": 0.6}
        (tmp_path / "edited.yaml").write_text(yaml.safe_dump(plan))
        result = srcr(
            "compress", tiny, "-o", tmp_path / "two", "--plan", tmp_path / "edited.yaml",
            "--calibration", ids, "--json",
        )  # fmt: skip
        assert result.code == 0, result.err
        weights, base = block_linears(tmp_path / "two"), block_linears(tiny)
        assert torch.equal(weights[first["name"]], base[first["name"]])
        low = weights[second["name"]]
        assert max(len(row.unique()) for row in low) <= 4
        assert int((low == 0).sum()) >= round(0.6 * low.numel())
        sizes = {name: weight.numel() for name, weight in base.items()}
        total = sum(sizes.values())
        bits = dict.fromkeys(sizes, 4) | {first["name"]: 16, second["name"]: 2}
        expected = sum(size * bits[name] for name, size in sizes.items()) / total
        assert result.json()["rates"]["bits"] == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda plan: plan["layers"][0].update(name="model.layers.9.x"), "no linear layer"),
            (lambda plan: plan["layers"].append(plan["layers"][0]), "twice"),
            (lambda plan: plan["layers"][0]["quant"].update(num_bits=1), "num_bits 1"),
            (lambda plan: plan["layers"][0]["quant"].update(method="magic"), "'magic' is not known"),
            (lambda plan: plan["layers"][0]["quant"].update(group_size=7), "does not divide"),
            (lambda plan: plan.update(extra=1), "extra"),
            (lambda plan: plan.pop("layers"), "layers"),
            (lambda plan: plan["solver"].update(mode="both"), "mode"),
            (lambda plan: plan["layers"][0].update(prune={"method": "wanda", "sparsity": 1.5}),
             "sparsity 1.5"),
        ],
    )  # fmt: skip
    def test_plans_that_do_not_fit(self, change, message, srcr, tiny, ids, tmp_path, planned):
        plan = yaml.safe_load(planned)
        change(plan)
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
        before = set(tmp_path.iterdir())
        result = srcr(
            "compress", tiny, "-o", tmp_path / "out", "--plan", tmp_path / "plan.yaml",
            "--calibration", ids,
        )  # fmt: skip
        assert result.code == 2
        assert message in result.error()
        assert set(tmp_path.iterdir()) == before

    @pytest.fixture(scope="class")
    def planned(self):
        """The text of a plan that fits the tiny Llama."""
        shapes = open_model(tiny_model("llama")).topology.shapes
        return to_yaml(uniform_plan(shapes, Recipe(None, QuantSpec())))

    @pytest.mark.parametrize(
        "text", ["a: [", "- 1", "just words", "", "!!python/object:os.system x"]
    )
    def test_files_that_are_no_plans(self, text, srcr, tiny, tmp_path):
        (tmp_path / "plan.yaml").write_text(text)
        result = srcr("compress", tiny, "-o", tmp_path / "out", "--plan", tmp_path / "plan.yaml")
        assert result.code == 2
        assert str(tmp_path / "plan.yaml") in result.error()

    def test_a_plan_and_what_it_decides(self, srcr, tiny, tmp_path, planned):
        (tmp_path / "plan.yaml").write_text(planned)
        for option in (["--bits", 3], ["--sparsity", 0.5], ["--mode", "joint"], ["--symmetric"]):
            result = srcr(
                "compress", tiny, "-o", tmp_path / "out", "--plan", tmp_path / "plan.yaml", *option
            )
            assert result.code == 2
            assert f"leave {option[0].replace('--a', '--')}" in result.error()


class TestSomeLayers:
    def run(self, srcr, tiny, ids, tmp_path, *options):
        return srcr(
            "compress", tiny, "-o", tmp_path / "out", "--calibration", ids, "--quant-method", "rtn",
            *options,
        )  # fmt: skip

    def test_layers_are_left_alone_to_the_bit(self, srcr, tiny, ids, tmp_path):
        out = tmp_path / "out"
        patterns = ("--ignore", "re:.*layers.1", "--ignore", "lm_head", "--targets", "*.mlp.*")
        result = self.run(srcr, tiny, ids, tmp_path, *patterns, "--json")
        assert result.code == 0, result.err
        record = result.json()
        chosen = {layer["name"] for layer in record["layers"]}
        names = ("gate", "up", "down")
        assert chosen == {f"model.layers.0.mlp.{name}_proj" for name in names}
        before, after = block_linears(tiny), block_linears(out)
        sizes = {name: weight.numel() for name, weight in before.items()}
        share = sum(sizes[name] for name in chosen) / sum(sizes.values())
        assert record["rates"]["tcr"] == pytest.approx(0.75 * share)
        assert {name for name in before if not torch.equal(before[name], after[name])} == chosen
        assert any("11 of 14 linear layers" in note for note in record["notes"])

    def test_overrides_become_the_plan(self, srcr, tiny, ids, tmp_path):
        text = "sparsity: 0.5\noverrides: {'*.down_proj': {bits: 6}, 'model.layers.0.*': {sparsity: 0}}"
        (tmp_path / "run.yaml").write_text(text)
        result = self.run(srcr, tiny, ids, tmp_path, "--config", tmp_path / "run.yaml")
        assert result.code == 0, result.err
        plan = yaml.safe_load((tmp_path / "out/plan.yaml").read_text())
        for layer in plan["layers"]:
            assert layer["quant"]["num_bits"] == (6 if "down" in layer["name"] else 4)
            assert ("prune" in layer) == ("layers.1." in layer["name"])

    @pytest.mark.parametrize("option", ["--ignore", "--targets"])
    def test_a_pattern_without_a_layer(self, option, srcr, tiny, ids, tmp_path):
        before = set(tmp_path.iterdir())
        result = self.run(srcr, tiny, ids, tmp_path, option, "*.down_prj")
        assert result.code == 2
        assert f"{option[2:]} pattern '*.down_prj' matches no layer" in result.error()
        assert "mlp.down_proj" in result.error()
        assert set(tmp_path.iterdir()) == before

    def test_embeddings(self, srcr, tiny, ids, tmp_path):
        result = self.run(srcr, tiny, ids, tmp_path, "--embeddings", 8, "--json")
        assert result.code == 0, result.err
        record = result.json()
        assert {each["name"] for each in record["embeddings"]} == {"model.embed_tokens", "lm_head"}
        assert record["rates"]["tcr"] == 0.75
        assert "embed_tokens is packed" in result.err.replace("\n", " ")
        assert "model.embed_tokens: 96x32, 8 bits" in srcr("inspect", tmp_path / "out").out
        assert self.run(srcr, tiny, ids, tmp_path, "--embeddings", 3, "--overwrite").code == 2


class TestConfig:
    def run(self, srcr, tiny, tmp_path, text, *options):
        (tmp_path / "run.yaml").write_text(text)
        return srcr(
            "compress", tiny, "-o", tmp_path / "out", "--config", tmp_path / "run.yaml", *options
        )

    def test_options_come_from_the_file_and_the_command_line_wins(self, srcr, tiny, ids, tmp_path):
        text = f"sparsity: 0.5\nbits: 3\nsymmetric: false\ncalibration: {ids}\nquant_method: rtn\n"
        result = self.run(srcr, tiny, tmp_path, text, "--bits", 5, "--symmetric", "--json")
        assert result.code == 0, result.err
        rates = result.json()["rates"]
        assert rates["bits"] == 5
        assert rates["sparsity"] == pytest.approx(0.5, abs=1e-3)
        plan = yaml.safe_load((tmp_path / "out/plan.yaml").read_text())
        quants = {
            (layer["quant"]["method"], layer["quant"]["symmetric"]) for layer in plan["layers"]
        }
        assert quants == {("rtn", True)}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("sparsty: 0.5", "sparsty"),
            ("bits: four", "bits"),
            ("[", "not valid YAML"),
            ("- a", "run.yaml"),
            ("mode: both", "mode"),
            ("bits: 1", "num_bits 1"),
        ],
    )
    def test_files_that_do_not_fit(self, srcr, tiny, tmp_path, text, message):
        result = self.run(srcr, tiny, tmp_path, text)
        assert result.code == 2
        assert message in result.error()
        assert not (tmp_path / "out").exists()


def test_json_is_all_there_is_on_stdout(srcr, tiny, ids, tmp_path):
    result = srcr("compress", tiny, "-o", tmp_path / "out", "--calibration", ids, "--json")
    assert result.code == 0
    printed = result.json()
    assert printed == json.loads((tmp_path / "out/srcr.json").read_text()) | {
        "out": str(tmp_path / "out")
    }


def test_the_table_names_the_result(srcr, tiny, ids, tmp_path):
    result = srcr("compress", tiny, "-o", tmp_path / "out", "--calibration", ids)
    assert result.code == 0
    assert "75.00 %" in result.out
    assert "compressed-tensors" in result.out


def test_overwrite_replaces_an_earlier_result_and_a_leftover(srcr, tiny, ids, tmp_path):
    out = tmp_path / "out"
    assert srcr("compress", tiny, "-o", out, "--calibration", ids, "--bits", 8).code == 0
    (tmp_path / "out.partial").mkdir()
    first = weight_bytes(out)
    result = srcr("compress", tiny, "-o", out, "--calibration", ids, "--overwrite")
    assert result.code == 0, result.err
    assert weight_bytes(out) != first
    assert {path.name for path in tmp_path.iterdir()} == {"tiny", "ids.safetensors", "out"}


def test_a_compressed_model_can_be_compressed_again(srcr, tiny, ids, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert srcr("compress", tiny, "-o", first, "--calibration", ids, "--bits", 8).code == 0
    asked = ("--calibration", ids, "--bits", 4, "--allow-requantize")
    result = srcr("compress", first, "-o", second, *asked)
    assert result.code == 0, result.err
    for weight in block_linears(second).values():
        assert max(len(row.unique()) for row in weight) <= 16


def test_bundled_is_a_model_and_a_text(srcr, tmp_path):
    from srcr import bundled

    if not bundled.model_path().is_dir():
        pytest.skip("the bundled model has not been built")
    result = srcr(
        "compress", "bundled", "-o", tmp_path / "out", "--calibration", "bundled",
        "--samples", 2, "--seq-len", 32, "--quant-method", "rtn", "--json",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert result.json()["calibration"]["source"] == "bundled"


class TestOneFileIsARun:
    def test_what_is_written_beside_the_result_runs_it_again(self, srcr, tiny, ids, tmp_path):
        first, again = tmp_path / "first", tmp_path / "again"
        options = ("--sparsity", "0.25", "--bits", "3", "--ignore", "*.k_proj", "--seed", "3")
        result = srcr("compress", tiny, "-o", first, "--calibration", ids, *options)
        assert result.code == 0, result.err
        run = yaml.safe_load((first / "run.yaml").read_text())
        assert run["model"] == Path(tiny).name  # no place of this machine
        assert "out" not in run
        assert (run["sparsity"], run["bits"], run["group_size"]) == (0.25, 3, "auto")
        assert run["format"] == "compressed-tensors"
        assert "device" not in run
        config = tmp_path / "moved.yaml"
        places = {"model": str(tiny), "calibration": str(ids), "out": str(again)}
        config.write_text(yaml.safe_dump(run | places))
        result = srcr("compress", "--config", config)
        assert result.code == 0, result.err
        for name in ("model.safetensors", "plan.yaml", "config.json", "run.yaml"):
            assert (again / name).read_bytes() == (first / name).read_bytes()

    def test_a_plan_lies_beside_it(self, srcr, tiny, ids, tmp_path):
        first = tmp_path / "first"
        srcr("compress", tiny, "-o", first, "--calibration", ids, "--bits", "3", "--seed", "5")
        planned = tmp_path / "planned"
        asked = ("--calibration", ids, "--plan", first / "plan.yaml")
        assert srcr("compress", tiny, "-o", planned, *asked).code == 0
        assert yaml.safe_load((planned / "run.yaml").read_text())["plan"] == "plan.yaml"
        again = tmp_path / "again"
        places = ("-o", again, "--calibration", ids, "--config", planned / "run.yaml")
        result = srcr("compress", tiny, *places)
        assert result.code == 0, result.err
        for name in ("model.safetensors", "plan.yaml"):  # its seed, too
            assert (again / name).read_bytes() == (first / name).read_bytes()

    def test_what_is_named_nowhere_is_asked_for(self, srcr, tiny, tmp_path):
        result = srcr("compress", "-o", tmp_path / "out")
        assert result.code == 2
        assert "Missing argument 'MODEL'" in result.err
        result = srcr("compress", tiny)
        assert result.code == 2
        assert "Missing option '--out'" in result.err
