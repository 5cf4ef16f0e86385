"""Files that belong to a model travel with it; what does not is neither fetched nor named."""

import ast
import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub.utils import filter_repo_objects

from srcr.data.tokens import Tokens
from srcr.models.companions import COMPANION_PATTERNS, copy_companions, with_code_that_is_there
from srcr.models.load import resolve
from srcr.pipelines.compress import compress
from srcr.pipelines.options import RunOptions
from srcr.plans.plan import Recipe
from srcr.plans.specs import PruneSpec
from srcr.testing import save_tiny_model


def tokenizer_files():
    """The file names of every tokenizer of transformers."""
    names = set()
    for path in (Path(transformers.__file__).parent / "models").glob("*/tokenization_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
            if named and node.targets[0].id.startswith("VOCAB_FILES_NAMES"):
                names |= set(ast.literal_eval(node.value).values())
    return {name for name in names if isinstance(name, str)}


def test_every_tokenizer_of_transformers():
    names = tokenizer_files()
    assert len(names) > 15
    for name in names:
        assert any(fnmatch(name, pattern) for pattern in COMPANION_PATTERNS), name


@pytest.mark.parametrize(
    "name",
    [
        "LICENSE.txt", "LICENCE", "NOTICE", "Notice.txt", "USE_POLICY.md", "THIRD_PARTY_NOTICES", "COPYING",
        "License.md", "license", "licence.txt", "LLAMA_USE_POLICY.md", "NVIDIA_THIRD_PARTY.txt", "spm.vocab",
        "chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja",
        "processor_config.json", "video_preprocessor_config.json", "tekken.json", "qwen.tiktoken",
    ],
)  # fmt: skip
def test_templates_processors_and_notices(name, tmp_path):
    base, out = save_tiny_model(tmp_path / "base", "llama"), tmp_path / "out"
    (base / name).parent.mkdir(exist_ok=True)
    (base / name).write_text("{}")
    out.mkdir()
    copy_companions(base, out)
    assert (out / name).read_text() == "{}"
    assert not list(out.glob("*.safetensors"))


class TestCode:
    """``auto_map`` names only code that is there."""

    @pytest.fixture
    def base(self, tmp_path):
        folder = save_tiny_model(tmp_path / "base", "llama")
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] = {
            "AutoConfig": "configuration_x.C",
            "AutoModelForCausalLM": "modeling_x.M",
        }
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def compressed(self, base, tmp_path):
        ids = Tokens.of(torch.arange(64).view(4, 16))
        recipe = Recipe(PruneSpec("magnitude", 0.25))
        compress(str(base), tmp_path / "out", recipe, ids, RunOptions(quiet=True))
        return json.loads((tmp_path / "out" / "config.json").read_text()).get("auto_map")

    def test_with_its_code(self, base, tmp_path):
        (base / "configuration_x.py").write_text("from transformers import LlamaConfig as C\n")
        (base / "modeling_x.py").write_text("from .helper_x import M\n")
        (base / "helper_x.py").write_text("from transformers import LlamaForCausalLM as M\n")
        (base / "unrelated.py").write_text("")
        assert set(self.compressed(base, tmp_path)) == {"AutoConfig", "AutoModelForCausalLM"}
        copied = {path.name for path in (tmp_path / "out").glob("*.py")}
        assert copied == {"configuration_x.py", "modeling_x.py", "helper_x.py"}

    def test_without_it(self, base, tmp_path):
        assert self.compressed(base, tmp_path) is None

    @pytest.mark.parametrize("there", [True, False])
    def test_of_the_tokenizer(self, there, base, tmp_path):
        text = json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_x.T", None]}, "x": 1})
        (base / "tokenizer_config.json").write_text(text)
        if there:
            (base / "tokenization_x.py").write_text("")
        (tmp_path / "out").mkdir()
        copy_companions(base, tmp_path / "out")
        copied = (tmp_path / "out" / "tokenizer_config.json").read_text()
        assert copied == text if there else json.loads(copied) == {"x": 1}
        assert (tmp_path / "out" / "tokenization_x.py").is_file() is there

    def test_in_part_and_elsewhere(self, base):
        (base / "configuration_x.py").write_text("")
        auto_map = {
            "AutoConfig": "configuration_x.C",
            "AutoModelForCausalLM": "modeling_x.M",
            "AutoModel": "org/name--modeling_y.M",
            "AutoTokenizer": ["tokenization_x.T", None],
        }
        kept = with_code_that_is_there({"auto_map": auto_map, "a": 1}, base)
        assert kept == {
            "a": 1,
            "auto_map": {key: auto_map[key] for key in ("AutoConfig", "AutoModel")},
        }


class Hub:
    """A repository of the hub, and what was downloaded of it."""

    def __init__(self, files, cache):
        self.files = dict.fromkeys(files, "") if isinstance(files, list) else files
        self.folder = cache / "models--org--name" / "snapshots" / "0123456789abcdef"

    def snapshot_download(self, name, allow_patterns, ignore_patterns=None, revision=None):
        assert name == "org/name"
        assert revision in (None, self.folder.name)
        for file in filter_repo_objects(
            list(self.files), allow_patterns=allow_patterns, ignore_patterns=ignore_patterns or None
        ):
            (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / file).write_text(self.files[file])
        self.folder.mkdir(parents=True, exist_ok=True)
        return str(self.folder)

    def fetched(self):
        paths = (path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix() for path in paths}


FOREIGN = [
    "consolidated.safetensors", "consolidated.00.safetensors", "original/model.safetensors",
    "original/tokenizer.model", "original/params.json", "onnx/model.onnx", "model.gguf", "pytorch_model.bin",
    "metal/model.safetensors",
]  # fmt: skip
PARTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
BESIDE = ["config.json", "tokenizer.json", "LICENSE", "chat_template.jinja", "modeling_x.py"]


@pytest.mark.parametrize(
    "weights",
    [
        {"model.safetensors": ""},
        {"weights.safetensors": ""},
        {**dict.fromkeys(PARTS, ""),
         "model.safetensors.index.json": json.dumps({"weight_map": {"a": PARTS[0], "b": PARTS[1]}})},
    ],
    ids=["whole", "another name", "sharded"],
)  # fmt: skip
def test_a_download_takes_what_belongs_to_the_model(weights, tmp_path, monkeypatch):
    hub = Hub(dict.fromkeys([*FOREIGN, *BESIDE], "") | weights, tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    assert resolve("org/name") == hub.folder
    assert hub.fetched() == {*BESIDE, *weights}


def test_nothing_of_a_whole_checkpoint_is_fetched_twice(tmp_path, monkeypatch):
    extra = ["model.safetensors", "adapter_model.safetensors", "other.safetensors"]
    hub = Hub([*BESIDE, *extra], tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    resolve("org/name")
    assert hub.fetched() == {*BESIDE, "model.safetensors"}
    shutil.rmtree(hub.folder)
