"""A checkpoint is a stranger's: whatever is in it, srcr works or says in one line what is wrong."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import struct
import threading

import pytest
import torch
from safetensors.torch import save_file

from srcr.data.specs import Calibration
from srcr.errors import NumericalError, SrcrError
from srcr.models.checkpoint import open_model
from srcr.models.load import load_model
from srcr.pipelines.compress import compress
from srcr.pipelines.inspect import inspect
from srcr.pipelines.options import Output, RunOptions
from srcr.plans.plan import Recipe
from srcr.plans.specs import PruneSpec, QuantSpec
from srcr.testing import save_tiny_model, tiny_model

pytestmark = pytest.mark.slow

DEEP: dict = {}
for _ in range(500):
    DEEP = {"a": DEEP}
VALUES = [
    0, -1, 1, 3, 7, 10**6, 10**9, 10**12, 10**19, 2**63, -(10**12), 0.5, 1e308, float("nan"), float("inf"),
    True, False, None, "", "x", "32", "gelu", "bfloat16", "../../x", [], [1], {}, {"a": 1}, [[[]]],
    ["LlamaForCausalLM"], "a" * 10000, "\ud800", "\x00", DEEP,
]  # fmt: skip
KEYS = [
    "architectures", "model_type", "auto_map", "quantization_config", "dtype", "rope_scaling",
    "rope_parameters", "rope_theta", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings", "hidden_act",
    "tie_word_embeddings", "rms_norm_eps", "attention_bias", "attn_implementation", "text_config",
    "layer_types", "num_labels", "id2label", "output_hidden_states", "pruned_heads", "sliding_window",
    "transformers_weights", "configuration_files", "experts_implementation", "base_config_key",
]  # fmt: skip


@contextlib.contextmanager
def limited():
    """At most 4 GB more than now, and 60 seconds."""
    pages = int(open("/proc/self/statm").read().split()[0])  # noqa: SIM115, PTH123
    before = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * os.sysconf("SC_PAGE_SIZE") + 4 * 10**9
    main = threading.current_thread() is threading.main_thread()

    def late(*_):
        raise TimeoutError("a checkpoint must not keep srcr busy without end")

    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    old = signal.signal(signal.SIGALRM, late) if main else None
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)
        if main:
            signal.signal(signal.SIGALRM, old)
        resource.setrlimit(resource.RLIMIT_AS, before)


def hash_weights(folder):
    """Open a model and read every weight."""
    return open_model(folder).sha256


def works_or_says_why(folder):
    """Nothing but a SrcrError with one printable line that is not too long."""
    for run in (inspect, hash_weights):
        try:
            with limited():
                run(folder)
        except SrcrError as error:
            message = str(error)
            assert message.isprintable(), message
            assert len(message) < 1500


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fuzzed_configs(family, tmp_path):
    base = save_tiny_model(tmp_path / "base", family)
    rng = random.Random(f"config {family}")
    good = json.loads((base / "config.json").read_text())
    for _ in range(60):
        config = dict(good)
        for _ in range(rng.choice([1, 1, 1, 2])):
            key = rng.choice([*good, *KEYS])
            if rng.random() < 0.15:
                config.pop(key, None)
            else:
                config[key] = rng.choice(VALUES)
        (base / "config.json").write_text(json.dumps(config))
        works_or_says_why(base)


def test_fuzzed_headers(tmp_path):
    base = save_tiny_model(tmp_path / "base", "llama")
    path = base / "model.safetensors"
    good = path.read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    header, data = json.loads(good[8 : 8 + length]), good[8 + length :]
    rng = random.Random("header")
    for number in range(80):
        changed = json.loads(json.dumps(header))
        name = rng.choice([key for key in header if key != "__metadata__"])
        kind = number % 8
        if kind == 0:
            changed[name]["shape"] = rng.choice(
                [[10**12, 10**12], [-1, 4], [0], [], [2**63], "x", None]
            )
        elif kind == 1:
            changed[name]["data_offsets"] = rng.choice(
                [[0, 10**15], [8, 0], [-8, 8], [0], "x", [0.5, 1]]
            )
        elif kind == 2:
            changed[name]["dtype"] = rng.choice(["F64", "I8", "BOOL", "pickle", 7, None])
        elif kind == 3:
            changed[rng.choice(["../x", "", "\x00", name + ".x"])] = changed.pop(name)
        blob = json.dumps(changed).encode()
        raw = struct.pack("<Q", len(blob)) + blob + data
        if kind == 4:
            raw = good[: rng.randrange(len(good))]
        elif kind == 5:
            raw = struct.pack("<Q", rng.choice([0, 1, length - 3, 10**15, 2**64 - 1])) + good[8:]
        elif kind == 6:
            raw = bytearray(good)
            for _ in range(3):
                raw[rng.randrange(8 + length)] ^= 1 << rng.randrange(8)
        elif kind == 7:
            raw = rng.randbytes(rng.choice([0, 4, 8, 200]))
        path.write_bytes(bytes(raw))
        works_or_says_why(base)


def test_fuzzed_indexes(tmp_path):
    base = save_tiny_model(tmp_path / "base", "llama")
    single = base / "model.safetensors"
    index = base / "model.safetensors.index.json"
    shard = base / "model-00001-of-00001.safetensors"
    single.rename(shard)
    from safetensors import safe_open

    with safe_open(shard, "pt") as stream:
        names = list(stream.keys())
    good = dict.fromkeys(names, shard.name)
    save_file({"x": torch.zeros(1)}, tmp_path / "outside.safetensors")
    (base / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    name = names[0]
    for weight_map in (
        good | {name: "../outside.safetensors"}, good | {name: str(tmp_path / "outside.safetensors")},
        good | {name: "missing.safetensors"}, good | {name: "config.json"}, good | {name: 7},
        good | {name: "link.safetensors"}, good | {name: "\x00.safetensors"}, {}, [], None, "x",
        good | {"more": shard.name},
    ):  # fmt: skip
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        works_or_says_why(base)
    index.write_text("[" * 100_000)
    works_or_says_why(base)
    index.write_text(json.dumps({"metadata": {}, "weight_map": good}))
    assert len(inspect(base).blocks) == 2


def refused(folder, message):
    with pytest.raises(SrcrError, match=message):
        inspect(folder)
    with pytest.raises(SrcrError, match=message):
        hash_weights(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_size", 1 << 40, "config.json declares"),
        ("vocab_size", 10**12, "config.json declares"),
        ("num_hidden_layers", 10**9, "num_hidden_layers 1000000000"),
        ("model_type", "evil", "code that comes with a model is never run"),
    ],
)
def test_what_declares_more_than_it_holds_is_refused_before_memory_is_taken(
    key, value, message, tmp_path
):
    base = save_tiny_model(tmp_path / "base", "llama")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {key: value}))
    with limited():
        refused(base, message)


def test_a_model_that_is_mostly_its_tied_embedding_is_taken(tmp_path):
    base = save_tiny_model(tmp_path / "base", "llama", vocab_size=9000, tie_word_embeddings=True)
    hash_weights(base)


def test_remote_code_is_never_run(tmp_path):
    base = save_tiny_model(tmp_path / "base", "llama")
    (base / "evil.py").write_text("import pathlib; pathlib.Path('EVIL').touch()\nclass C: pass\n")
    config = json.loads((base / "config.json").read_text())
    remote = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}
    (base / "config.json").write_text(json.dumps(config | {"auto_map": remote}))
    works_or_says_why(base)
    (base / "config.json").write_text(
        json.dumps(config | {"auto_map": remote, "model_type": "evil"})
    )
    refused(base, "never run")
    assert not (tmp_path / "EVIL").exists()


def test_pickles_are_never_read(tmp_path):
    base = save_tiny_model(tmp_path / "base", "llama")
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(b"\x80\x04c__main__\nEVIL\n.")
    refused(base, "pickle files")


def test_links_that_lead_out_are_refused_but_for_weights(tmp_path):
    base = save_tiny_model(tmp_path / "base", "llama")
    away = tmp_path / "away"
    away.mkdir()
    shutil.move(base / "model.safetensors", away / "w.safetensors")
    (base / "model.safetensors").symlink_to(away / "w.safetensors")
    assert inspect(base).blocks
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (base / "tokenizer_config.json").symlink_to(secret)
    refused(base, "leads out of its folder")
    (base / "tokenizer_config.json").unlink()
    os.mkfifo(base / "tokenizer_config.json")
    refused(base, "no plain file")


def test_the_hubs_cache_is_made_of_links(tmp_path):
    base = save_tiny_model(tmp_path / "base", "llama")
    home = tmp_path / "models--a--b"
    (home / "blobs").mkdir(parents=True)
    snapshot = home / "snapshots" / "123"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(base.iterdir())):
        shutil.move(path, home / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert inspect(snapshot).blocks


def test_a_tensor_in_two_files_or_not_where_the_index_says(tmp_path):
    base = save_tiny_model(tmp_path / "base", "llama")
    shutil.copyfile(base / "model.safetensors", base / "again.safetensors")
    (base / "model.safetensors").rename(base / "first.safetensors")
    refused(base, "in two files")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(srcr, ids, tmp_path):
    base = save_tiny_model(tmp_path / "base", "llama")
    place = tmp_path / "place"
    place.mkdir(mode=0o500)
    result = srcr("compress", base, "-o", place / "out", "--calibration", ids)
    assert result.code == 2
    assert "nothing can be written into" in result.error()


def test_a_read_only_disk(srcr, ids, tmp_path):
    """On a file system mounted read-only, where this may be done here."""
    import subprocess

    base = save_tiny_model(tmp_path / "base", "llama")
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m,ro", "tmpfs", place], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        result = srcr("compress", base, "-o", place / "out", "--calibration", ids)
    finally:
        subprocess.run(["umount", place], check=True)
    assert result.code == 2
    assert "nothing can be written into" in result.error()


def test_activations_that_overflow_stop_the_run(tmp_path):
    """Finite weights whose activations are not: the first block's MLP overflows float32."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.down_proj").weight.mul_(1e38)
        model.get_submodule("model.layers.0.mlp.up_proj").weight.mul_(1e10)
    model.save_pretrained(tmp_path / "model")
    ids = torch.randint(0, 96, (5, 24), generator=torch.Generator().manual_seed(3))
    recipe, output = Recipe(None, QuantSpec()), Output(tmp_path / "out")
    with pytest.raises(NumericalError, match=r"model\.layers\.\d\.\S+"):
        compress(tmp_path / "model", output, recipe, Calibration(ids), RunOptions(quiet=True))
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def half_model(folder, changes):
    """A tiny Llama in float16, some of whose weights are multiplied."""
    model = tiny_model("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for ending, factor in changes.items():
                if name.endswith(ending):
                    parameter.mul_(factor)
    model.half().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("recipe", [Recipe(PruneSpec()), Recipe(None, QuantSpec())])
@pytest.mark.parametrize("family", ["residual", "inside"])
def test_a_float16_model_that_overflows_when_it_runs_is_compressed_all_the_same(
    family, recipe, tmp_path
):
    """Blocks run in float32, and so does what is read back: no work is thrown away at the end."""
    changes = {"residual": {"down_proj.weight": 3e4, "o_proj.weight": 3e4, "embed_tokens.weight": 3e4},
               "inside": {"up_proj.weight": 6e4, "down_proj.weight": 1e-3}}  # fmt: skip
    folder = half_model(tmp_path / "model", changes[family])
    ids = torch.randint(0, 96, (5, 24), generator=torch.Generator().manual_seed(3))
    assert not torch.isfinite(load_model(folder)(ids).logits).all()
    options = RunOptions(quiet=True)
    record = compress(folder, Output(tmp_path / "out"), recipe, Calibration(ids), options)
    assert record.verification.precision == "float32"


def test_weights_that_leave_float16_name_their_layer_at_once(tmp_path):
    folder = half_model(tmp_path / "model", {"layers.0.mlp.up_proj.weight": 9e4})
    assert all(torch.isfinite(p).all() for p in load_model(folder).parameters())
    # Few different inputs: what is pruned is made up for by large changes.
    ids = torch.randint(0, 4, (5, 24), generator=torch.Generator().manual_seed(3))
    recipe, output = Recipe(PruneSpec(sparsity=0.6)), Output(tmp_path / "out")
    with pytest.raises(NumericalError, match=r"layers\.0\.mlp\.up_proj.*too large for float16"):
        compress(folder, output, recipe, Calibration(ids), RunOptions(quiet=True))
