"""Whatever is wrong: the right exit code, one line that says it, and nothing left behind."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from architectures import tiny_architecture
from srcr.data.sources import Calibration
from srcr.pipelines.compress import compress
from srcr.pipelines.options import RunOptions
from srcr.plans.plan import Recipe
from srcr.plans.specs import QuantSpec
from srcr.testing import save_tiny_model

pytestmark = pytest.mark.slow


def files(folder):
    """Everything below a folder, with what it holds."""
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.fixture
def refused(srcr, tmp_path):
    """Run a command that must fail, and give its one line; nothing may be written."""

    def run(*args, code=2):
        before = files(tmp_path)
        result = srcr(*args)
        assert result.code == code, result.err
        assert result.out == ""
        assert files(tmp_path) == before
        return result.error()

    return run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sparsity", 1.5], "sparsity 1.5 is out of range"),
        (["--sparsity", 1], "sparsity 1.0 is out of range"),
        (["--sparsity", -0.1], "sparsity -0.1 is out of range"),
        (["--sparsity", "nan"], "sparsity nan is out of range"),
        (["--bits", 1], "num_bits 1 is out of range"),
        (["--bits", 9], "num_bits 9 is out of range"),
        (["--bits", 0], "num_bits 0 is out of range"),
        (["--group-size", 7], "group size 7 does not divide the width 32"),
        (["--group-size", 0], "group size '0': use auto"),
        (["--group-size", -5], "group size '-5': use auto"),
        (["--group-size", "big"], "group size 'big': use auto"),
        (["--structure", "2:5"], "2:5 sparsity needs widths that 5 divides"),
        (["--structure", "4:2"], "N must be at least 1 and less than M"),
        (["--structure", "blocks"], "mask structure 'blocks' is not known"),
        (["--structure", "2:4", "--sparsity", 0.3], "sparsity 0.3 contradicts 2:4"),
        (["--prune-method", "guess"], "prune method 'guess' is not known: use "),
        (["--quant-method", "guess"], "quant method 'guess' is not known: use "),
        (
            ["--mode", "jont"],
            "--mode 'jont' is not known: use joint, sequential-a, sequential-b (did you",
        ),
        (["--format", "onnx"], "format 'onnx' is not known"),
        (["--device", "tpu"], "device 'tpu' is not known"),
        (["--samples", 0], "samples 0 must be at least 1"),
        (["--seq-len", 1], "seq-len 1 must be at least 2"),
        (["--samples", 9], "has 8 sequences, 9 were asked for"),
        (["--calibration", "bundled"], "the model has no tokenizer"),
        (["--calibration", "data.csv"], "'data.csv'"),
        (["--calibration", "nowhere.safetensors"], "nowhere.safetensors does not exist"),
        (["--bits", 16, "--format", "compressed-tensors"], "quantizes none"),
        (["--plan", "nowhere.yaml"], "cannot read nowhere.yaml"),
        (["--config", "nowhere.yaml"], "cannot read nowhere.yaml"),
        (["--memory", "4"], "memory '4' is no size: give a number above 0 and its unit, as 4GB"),
        (["--memory", "1MB"], "--memory 1MB is too little"),
        (["--format", "gptq", "--bits", 5], "gptq has codes of 2, 3, 4 and 8 bits"),
        (["--format", "gptq", "--bits", 16], "use --format dense"),
        (["--format", "gguf", "--asymmetric"], "with grids around 0 only"),
        (["--format", "gguf", "--group-size", 16], "has groups of 16: use --group-size 32"),
        (["--structure", "heads"], "structure heads: use --remove heads=0.25"),
        (["--structure", "layers"], "structure layers: use --remove layers=0.25"),
    ],
    ids=lambda value: "_".join(map(str, value)) if isinstance(value, list) else "",
)
def test_options_that_cannot_be(options, message, refused, tiny, ids, tmp_path):
    data = [] if "--calibration" in options else ["--calibration", ids]
    assert message in refused("compress", tiny, "-o", tmp_path / "out", *data, *options)


EMPTY = {
    "compress": ("-o", "OUT"),
    "search": ("-o", "OUT", "--target", "tcr=0.8"),
    "evaluate": ("EMPTY",),
    "recover": ("EMPTY", "-o", "OUT"),
    "sensitivity": ("-o", "OUT.json"),
    "plan": ("-o", "OUT.yaml", "--target", "tcr=0.8"),
}


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("search", ["--target", "tcr=2"], "tcr=2: a rate is from 0"),
        ("plan", ["--target", "tcr=2"], "tcr=2: a rate is from 0"),
        ("search", ["--target", "stored=much"], "'much' is no size"),
        ("search", ["--objective", "nonsense"], "unknown task 'nonsense'"),
        ("search", ["--format", "gguff"], "did you mean gguf?"),
        ("compress", ["--format", "dens"], "did you mean dense?"),
        ("compress", ["--quant-method", "gptqq"], "did you mean gptq?"),
        ("plan", ["--prune-method", "sparsgpt"], "did you mean sparsegpt?"),
        *((c, ["--device", "gpu"], "'gpu' is not known") for c in EMPTY if c != "evaluate"),
        *((c, ["--calibration", "no.txt"], "no.txt does not exist") for c in EMPTY if c != "evaluate"),
        *((c, ["--samples", 0], "samples 0 must be") for c in EMPTY if c != "recover"),
        *((c, ["--memory", "much"], "'much' is no size") for c in ("compress", "search")),
        ("evaluate", ["--text", "no.txt"], "no.txt does not exist"),
        ("evaluate", ["--tasks", "nonsense"], "unknown task 'nonsense'"),
        ("recover", ["--held-out", "no.txt"], "no.txt does not exist"),
        *((c, ["-o", "/proc/out"], "nothing can be written into /proc") for c in ("compress", "search")),
        *((c, ["-o", "EMPTY/out"], "lies in the model's folder") for c in ("compress", "search")),
    ],
    ids=lambda value: "_".join(map(str, value)) if isinstance(value, list) else "",
)  # fmt: skip
def test_what_can_be_refused_is_refused_before_the_model_is_read(
    command, options, message, refused, tmp_path
):
    """The model is an empty folder: whoever looks into it says that first."""
    (tmp_path / "empty").mkdir()
    names = {"EMPTY": str(tmp_path / "empty"), "OUT": str(tmp_path / "out")}
    args = [command, "EMPTY", *EMPTY[command], *options]
    for name, path in names.items():
        args = [str(arg).replace(name, path) for arg in args]
    assert message in refused(*args)


def test_what_is_compressed_already_is_asked_about(srcr, refused, tiny, ids, tmp_path):
    small, again = tmp_path / "small", tmp_path / "again"
    data = ("--calibration", ids, "--quant-method", "rtn")
    assert srcr("compress", tiny, "-o", small, *data).code == 0
    for command in (("compress",), ("search", "--target", "tcr=0.8")):
        message = refused(command[0], small, "-o", again, *command[1:], "--calibration", ids)
        assert "is compressed already (it holds srcr.json)" in message
    assert srcr("compress", small, "-o", again, *data, "--allow-requantize").code == 0
    for command in ("evaluate", "recover"):
        out = ("-o", tmp_path / "better") if command == "recover" else ()
        message = refused(command, small, tiny, *out)
        assert f"the original comes first, as in srcr {command} {tiny} {small}" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(refused, tiny, tmp_path):
    assert "torch sees no GPU" in refused(
        "compress", tiny, "-o", tmp_path / "o", "--device", "cuda:1"
    )


@pytest.mark.parametrize(
    "args",
    [
        ["compress"],
        ["compress", "model"],
        ["compress", "model", "-o"],
        ["compress", "model", "-o", "out", "--bits", "four"],
        ["compress", "model", "-o", "out", "--sparsty", "1"],
        ["evaluate", "model"],
        ["shrink", "model"],
    ],
    ids=" ".join,
)
def test_command_lines_that_cannot_be(args, srcr, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = srcr(*args)
    assert result.code == 2
    assert result.out == ""
    assert "Traceback" not in result.err
    assert "error" in result.err.lower()
    assert not list(tmp_path.iterdir())


class TestModels:
    def test_missing_folder(self, refused, tmp_path):
        missing, out = tmp_path / "no", tmp_path / "out"
        for command in (["inspect", missing], ["compress", missing, "-o", out]):
            assert "does not exist" in refused(*command)

    def test_not_causal(self, refused, tmp_path):
        config = AutoConfig.for_model("bert", architectures=["BertForMaskedLM"])
        config.save_pretrained(tmp_path / "bert")
        message = refused("compress", tmp_path / "bert", "-o", tmp_path / "out")
        assert "not a causal language model" in message
        assert "BertForMaskedLM" in message

    def test_a_weight_that_is_not_a_number(self, refused, tiny, ids, tmp_path):
        tensors = load_file(tiny / "model.safetensors")
        tensors["model.layers.1.self_attn.v_proj.weight"][2, 3] = float("nan")
        save_file(tensors, tiny / "model.safetensors", metadata={"format": "pt"})
        message = refused("compress", tiny, "-o", tmp_path / "out", "--calibration", ids)
        assert "model.layers.1.self_attn.v_proj.weight holds 1 non-finite value" in message

    def test_a_truncated_file(self, refused, tiny, tmp_path):
        path = tiny / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        message = refused("compress", tiny, "-o", tmp_path / "out")
        assert "model.safetensors is not a valid safetensors file" in message

    def test_experts_in_a_layout_that_is_not_known(self, refused, tmp_path):
        tiny_architecture("longcat_flash").save_pretrained(tmp_path / "moe")
        message = refused("compress", tmp_path / "moe", "-o", tmp_path / "out")
        assert "LongcatFlashExperts" in message
        assert "stacks experts in a way that srcr does not know" in message

    def test_activations_that_overflow_exit_with_1(self, refused, tiny, ids, tmp_path):
        tensors = load_file(tiny / "model.safetensors")
        for name in ("down_proj", "up_proj"):
            tensors[f"model.layers.0.mlp.{name}.weight"] *= 1e25
        save_file(tensors, tiny / "model.safetensors", metadata={"format": "pt"})
        options = ["--calibration", ids, "--quant-method", "rtn"]
        message = refused("compress", tiny, "-o", tmp_path / "out", *options, code=1)
        assert "not finite" in message
        assert "model.layers." in message

    def test_conv1d_in_compressed_tensors(self, refused, ids, tmp_path):
        base = save_tiny_model(tmp_path / "base", "gpt2")
        options = ["--calibration", ids, "--format", "compressed-tensors"]
        assert "Conv1D" in refused("compress", base, "-o", tmp_path / "out", *options)


class TestOutput:
    def test_it_exists(self, refused, tiny, tmp_path):
        (tmp_path / "out").mkdir()
        assert "out exists" in refused("compress", tiny, "-o", tmp_path / "out")

    def test_a_leftover_partial(self, refused, tiny, tmp_path):
        (tmp_path / "out.partial").mkdir()
        (tmp_path / "out.partial/half").write_text("half a file")
        assert "out.partial exists" in refused("compress", tiny, "-o", tmp_path / "out")

    def test_it_is_the_model(self, refused, tiny):
        assert "the model itself" in refused("compress", tiny, "-o", tiny, "--overwrite")

    def test_somebody_elses_folder(self, refused, tiny, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/thesis.txt").write_text("years of work")
        message = refused("compress", tiny, "-o", tmp_path / "out", "--overwrite")
        assert "did not write" in message

    def test_parent_folders_are_made_only_by_success(self, refused, srcr, tiny, ids, tmp_path):
        out = tmp_path / "new/deep/out"
        refused("compress", tiny, "-o", out, "--calibration", ids, "--bits", 1)
        refused("compress", tiny, "-o", out, "--calibration", ids, "--samples", 99)
        assert srcr("compress", tiny, "-o", out, "--calibration", ids).code == 0
        assert (out / "srcr.json").is_file()

    def test_a_file_where_a_folder_must_be(self, refused, tiny, tmp_path):
        (tmp_path / "file").write_text("a file")
        message = refused("compress", tiny, "-o", tmp_path / "file/out")
        assert "is a file, not a folder" in message

    def test_an_earlier_result_that_was_put_aside(self, refused, tiny, tmp_path):
        (tmp_path / "out.replaced").mkdir()
        message = refused("compress", tiny, "-o", tmp_path / "out", "--overwrite")
        assert "out.replaced exists" in message

    def test_a_partial_folder_of_somebody_else(self, refused, tiny, tmp_path):
        (tmp_path / "out.partial").mkdir()
        (tmp_path / "out.partial/thesis.txt").write_text("years of work")
        message = refused("compress", tiny, "-o", tmp_path / "out", "--overwrite")
        assert "did not write" in message

    def test_a_full_disk(self, srcr_process, tiny, ids, tmp_path):
        """A file system of its own, too small for the result."""
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = shutil.which("mount")
        options = ["-t", "tmpfs", "-o", "size=32k", "tmpfs", str(disk)]
        if not mount or subprocess.run([mount, *options], capture_output=True).returncode:
            pytest.skip("this user may not mount a small file system")
        try:
            result = srcr_process(
                "compress", tiny, "-o", disk / "out", "--calibration", ids, "--quant-method", "rtn"
            )
            left = list(disk.iterdir())
        finally:
            subprocess.run(["umount", str(disk)], check=True)
        assert result.code == 1, result.err
        assert f"writing {disk / 'out'} failed" in result.error()
        kept = "--resume continues" in result.error()  # what is finished stays, and is named
        assert left == ([disk / "out.partial"] if kept else [])


class TestEvaluate:
    @pytest.fixture(scope="class")
    def saved_compressed(self, saved_tiny, tmp_path_factory):
        """The tiny Llama compressed, which no test changes."""
        out = tmp_path_factory.mktemp("saved") / "small"
        rows = torch.randint(0, 96, (8, 32), generator=torch.Generator().manual_seed(0))
        compress(
            saved_tiny, out, Recipe(None, QuantSpec()), Calibration(rows), RunOptions(quiet=True)
        )
        return out

    @pytest.fixture
    def compressed(self, saved_compressed, tmp_path):
        return Path(shutil.copytree(saved_compressed, tmp_path / "small"))

    def test_missing_model(self, refused, tiny, tmp_path):
        assert "does not exist" in refused("evaluate", tiny, tmp_path / "no")
        assert "does not exist" in refused("evaluate", tmp_path / "no", tiny)

    def test_another_vocabulary(self, refused, tiny, tmp_path):
        from transformers import AutoModelForCausalLM

        config = AutoConfig.from_pretrained(tiny)
        config.vocab_size = 97
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
        message = refused("evaluate", tiny, tmp_path / "other")
        assert "vocabulary of 97" in message
        assert "96" in message

    def test_the_report_exists(self, refused, tiny, compressed, tmp_path):
        (tmp_path / "report.json").write_text("an earlier one")
        message = refused("evaluate", tiny, compressed, "-o", tmp_path / "report.json")
        assert "report.json exists" in message

    def test_no_place_for_the_report(self, refused, tiny, ids, tmp_path):
        options = ["--text", ids, "--overwrite", "-o"]
        (tmp_path / "folder").mkdir()
        assert "is a folder" in refused("evaluate", tiny, tiny, *options, tmp_path / "folder")
        message = refused("evaluate", tiny, tiny, *options, ids / "report.json")
        assert "is a file, not a folder" in message

    def test_the_folder_of_the_report_is_made(self, srcr, tiny, ids, tmp_path):
        report = tmp_path / "new/deep/report.json"
        assert srcr("evaluate", tiny, tiny, "--text", ids, "-o", report).code == 0
        assert json.loads(report.read_text())["divergence"]["top1_agreement"]["value"] == 1

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--samples", 0], "samples 0"),
            (["--seq-len", 1], "seq-len 1"),
            (["--text", "bundled"], "no tokenizer"),
            (["--text", "nowhere.safetensors"], "does not exist"),
            (["--limit", 5], "--limit 5 is a number of items a task"),
            (["--tasks", "bundled", "--limit", 0], "limit 0"),
            (["--tasks", ", ,"], "no task was given"),
            (["--semantic", "--prompts", 1], "1 prompts give no interval"),
            (["--semantic", "--prompt-len", 0], "prompt_len 0"),
            (["--semantic", "--new-tokens", 0], "max_new_tokens 0"),
            (["--device", "tpu"], "device 'tpu'"),
        ],
        ids=lambda value: "_".join(map(str, value)) if isinstance(value, list) else "",
    )
    def test_options_that_cannot_be(self, options, message, refused, tiny):
        assert message in refused("evaluate", tiny, tiny, *options)

    @pytest.mark.parametrize(
        "text", ["{", "[]", "{}", '{"rates": 3}', '{"rates": {}}', '{"rates": {"bits": "few"}}']
    )
    def test_a_broken_record(self, text, refused, tiny, compressed, ids):
        (compressed / "srcr.json").write_text(text)
        message = refused("evaluate", tiny, compressed, "--text", ids)
        assert "srcr.json" in message

    def test_an_unknown_task(self, refused, tiny):
        """(Near names: tests/metrics/test_tasks.py. To know all of them takes many seconds.)"""
        message = refused("evaluate", tiny, tiny, "--tasks", "./nowhere")
        assert "task folder nowhere does not exist" in message

    def test_tasks_need_a_tokenizer(self, refused, tiny, ids):
        options = ["--text", ids, "--tasks", "bundled"]
        assert "tokenizer" in refused("evaluate", tiny, tiny, *options)

    def test_continuations_beyond_the_context(self, refused, tiny, ids):
        options = ["--text", ids, "--semantic", "--prompts", 8, "--new-tokens", 5000]
        assert "context" in refused("evaluate", tiny, tiny, *options)

    def test_tokenizers_of_two_minds(self, refused, stories, tmp_path):
        other = tmp_path / "other"
        shutil.copytree(stories, other)
        path = other / "tokenizer.json"
        data = json.loads(path.read_text())
        vocab = data["model"]["vocab"]
        first, second = list(vocab)[300:302]
        vocab[first], vocab[second] = vocab[second], vocab[first]
        path.write_text(json.dumps(data))
        assert "different tokenizers" in refused("evaluate", stories, other)

    def test_an_earlier_evaluation_in_the_folder(self, refused, tiny, compressed, ids):
        (compressed / "evaluation.json").write_text("an earlier one")
        message = refused("evaluate", tiny, compressed, "--text", ids, "--report")
        assert "evaluation.json exists" in message
        assert (compressed / "evaluation.json").read_text() == "an earlier one"

    def test_options_of_semantic_without_it(self, refused, tiny):
        assert "belong to --semantic" in refused("evaluate", tiny, tiny, "--prompts", 30)

    def test_the_same_candidate_twice(self, refused, tiny, compressed, ids):
        assert "given twice" in refused("evaluate", tiny, compressed, compressed, "--text", ids)

    def test_a_report_into_what_is_no_folder_of_the_user(self, refused, tiny):
        assert "use -o FILE" in refused("evaluate", tiny, "bundled", "--report")

    def test_a_model_that_predicts_nothing_finite_exits_with_1(self, refused, tiny, ids, tmp_path):
        broken = tmp_path / "broken"
        shutil.copytree(tiny, broken)
        tensors = load_file(broken / "model.safetensors")
        tensors["model.layers.0.mlp.down_proj.weight"][:] = float("nan")
        save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
        assert "not finite" in refused("evaluate", tiny, broken, "--text", ids, code=1)


def test_verify_refuses_what_it_cannot_ask(refused, tiny, tmp_path):
    assert "engine 'ollama' is not known" in refused("verify", tiny, "--engines", "ollama")
    assert "does not exist" in refused("verify", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--steps", "10"], "has no srcr.json"),
        (["--steps", "0"], "steps 0"),
        (["--stage", "all"], "stage"),
        (["--loss", "mse"], "loss"),
    ],
)
def test_trainings_that_cannot_be_are_refused(args, message, tiny, refused, tmp_path):
    assert message in refused("recover", tiny, tiny, "-o", tmp_path / "out", *args)


def test_inspect_json_and_table(srcr, tiny):
    shown = srcr("inspect", tiny, "--json").json()
    assert shown["architecture"] == "LlamaForCausalLM"
    assert shown["dtype"] == "float32"
    assert shown["output_head"] == "lm_head"
    assert shown["tied_embeddings"] is False
    assert shown["quantized"] is False
    assert shown["base_bytes"] == (tiny / "model.safetensors").stat().st_size
    assert shown["parameters"] == sum(
        t.numel() for t in load_file(tiny / "model.safetensors").values()
    )
    assert len(shown["blocks"]) == 2
    units = shown["blocks"][1]["units"]
    assert units[0]["linears"] == [f"model.layers.1.self_attn.{x}_proj" for x in "qkv"]
    assert units[0]["shapes"] == [[32, 32], [16, 32], [16, 32]]
    shapes = [
        shape for block in shown["blocks"] for unit in block["units"] for shape in unit["shapes"]
    ]
    assert shown["linear_parameters"] == sum(height * width for height, width in shapes)
    table = srcr("inspect", tiny)
    assert table.code == 0
    for text in ("LlamaForCausalLM", "self_attn.q_proj", "lm_head", "32x48"):
        assert text in table.out


def test_methods_json_and_table(srcr):
    rows = srcr("methods", "--json").json()["methods"]
    names = {(row["kind"], row["name"]) for row in rows}
    assert {("prune", "sparsegpt"), ("prune", "wanda"), ("prune", "magnitude")} <= names
    assert {("quant", "gptq"), ("quant", "rtn")} <= names
    assert all(row["summary"] and row["paper"] for row in rows)
    table = srcr("methods")
    assert table.code == 0
    assert all(row["name"] in table.out for row in rows)


def test_version_of_the_process_and_help(srcr_process, tmp_path):
    """The module runs as a program; errors of the very first line are errors as well."""
    result = srcr_process("inspect", tmp_path / "nowhere")
    assert result.code == 2
    assert result.out == ""
    assert result.error().startswith("error: model folder")
    assert "Usage" in srcr_process("--help").out


def test_files_reads_contents(tmp_path):
    """The check that nothing was left behind would see a changed file."""
    (tmp_path / "a").write_text("1")
    before = files(tmp_path)
    Path(tmp_path / "a").write_text(json.dumps(2))
    assert files(tmp_path) != before
