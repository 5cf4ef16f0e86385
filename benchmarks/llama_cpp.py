"""srcr's GGUF beside llama.cpp's own quantization of the same size: KL to the original, all in llama.cpp.

    python benchmarks/llama_cpp.py MODEL -o WORK --calibration TEXT --text TEXT [--types Q4_0,Q4_K_M]
        [--configs 4,5] [--samples 64] [--eval-samples 32] [--seq-len 256] [--threads 2]

llama.cpp's files are made by its quantizer (``ggml_quantize_chunk``, with the importance of each column
measured on the same calibration text), tensor by tensor in the types that its program ``llama-quantize``
chooses (ggml-org/llama.cpp, src/llama-quant.cpp at 007dbbf). A configuration of srcr is "BITS" or
"SPARSITY+BITS", embeddings at 8 bits. What lies in WORK already is not made again. Needs
``pip install 'srcr[gguf]'``; prints a Markdown table.
"""

import argparse
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import gguf
import numpy as np
import torch
from torch import Tensor

import srcr
from srcr.data.sources import calibration_request, evaluation_request
from srcr.data.specs import Calibration, EvaluationText
from srcr.data.tokens import Tokens
from srcr.engines.llama_cpp import _library, open_llama
from srcr.formats import get_format
from srcr.formats.checkpoint import Checkpoint
from srcr.formats.gguf.architectures import TensorNames, architecture_of, write_metadata
from srcr.formats.gguf.vocabulary import chat_template, read_vocabulary, write_vocabulary
from srcr.models.checkpoint import OpenModel, open_model
from srcr.pipelines.opening import TextModel, load_text
from srcr.storage.layout import GGUF

#: What a type becomes where 256 does not divide the columns.
FALLBACK = {"Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def more_bits(i: int, n: int) -> bool:
    """The blocks whose values and down projections get a wider type."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def kind_of(ftype: str, name: str, columns: int, n: int) -> str:
    """The type that llama-quantize gives a tensor, with an importance matrix, where the embedding is the
    output head too."""
    if name.startswith(("token_embd", "output.")):
        return "Q8_0" if columns % 256 else "Q6_K"
    i, role = int(name.split(".")[1]), name.split(".")[2]
    if ftype == "Q4_0":
        return "Q4_1" if role == "ffn_down" and i < n // 8 else "Q4_0"
    kind = {"Q3_K_M": "Q3_K", "Q4_K_M": "Q4_K", "Q5_K_M": "Q5_K"}[ftype]
    if ftype == "Q3_K_M":
        if role == "attn_v":
            kind = "Q5_K" if i < 2 else "Q4_K"
        elif role == "ffn_down":
            kind = "Q5_K" if i < n // 16 else "Q4_K"
        elif role == "attn_output":
            kind = "Q4_K"
    elif role in ("attn_v", "ffn_down") and more_bits(i, n):
        kind = "Q6_K"
    return FALLBACK[kind] if columns % 256 else kind


@torch.no_grad()
def importance(opened: OpenModel, tokens: Tokens) -> dict[str, Tensor]:
    """The mean square of each linear's inputs, float32 [columns], by the linear's name."""
    model, sums, handles = opened.loaded(torch.float32), {}, []
    for name in opened.topology.linears():

        def add(_: Any, inputs: Any, name: str = name) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            sums[name] = sums.get(name, 0) + x.square().sum(0)

        handles.append(model.get_submodule(name).register_forward_pre_hook(add))
    for row in tokens.input_ids:
        model(row[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: value / tokens.input_ids.numel() for name, value in sums.items()}


def quantize(matrix: Tensor, kind: str, weights: Tensor | None) -> np.ndarray:
    """The blocks uint8 [rows, bytes] that llama.cpp makes of a matrix."""
    number = gguf.GGMLQuantizationType[kind]
    columns, size = gguf.GGML_QUANT_SIZES[number]
    rows, cols = matrix.shape
    source = np.ascontiguousarray(matrix.to(torch.float32).numpy())
    out = np.empty((rows, cols // columns * size), np.uint8)
    scale = None if weights is None else np.ascontiguousarray(weights.numpy(), np.float32)
    function = _library().ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    written = function(
        ctypes.c_int(int(number)), ctypes.c_void_p(source.ctypes.data),
        ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(0), ctypes.c_int64(rows),
        ctypes.c_int64(cols), ctypes.c_void_p(None if scale is None else scale.ctypes.data),
    )  # fmt: skip
    assert written == out.nbytes
    return out


def write_peer(
    opened: OpenModel, folder: Path, ftype: str, weights: dict[str, Tensor], path: Path
) -> None:
    """The model as llama.cpp's own quantizer makes it. ``folder``: where the model's tokenizer lies."""
    checkpoint, names = Checkpoint.of(opened), TensorNames(opened.config)
    writer = gguf.GGUFWriter(path, architecture_of(opened.config.model_type).name)
    write_metadata(writer, opened.config)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    vocabulary = read_vocabulary(folder, checkpoint.vocabulary)
    write_vocabulary(writer, vocabulary, chat_template(folder))
    linears = opened.topology.parameters()
    for name in checkpoint.plain_names():
        tensor, stored = checkpoint.tensor(name), names.name(name)
        order = names.row_order(name)
        tensor = tensor.to(torch.float32) if order is None else tensor[order].to(torch.float32)
        if tensor.ndim == 1:
            writer.add_tensor(stored, (tensor + names.offset(name)).numpy())
            continue
        kind = kind_of(ftype, stored, tensor.shape[1], opened.config.num_hidden_layers)
        blocks = quantize(tensor, kind, weights.get(linears.get(name, "")))
        writer.add_tensor(stored, blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def log_probabilities(path: Path, ids: Tensor, threads: int) -> Iterator[Tensor]:
    """For each row of ids [rows, len] the logarithms of probabilities float32 [len, vocabulary]."""
    with open_llama(path, ids.shape[1], threads) as model:
        for row in ids:
            yield model.logits(row[None])[0].log_softmax(-1)


def divergence(base: Path, other: Path, ids: Tensor, threads: int) -> tuple[float, float, float]:
    """KL to the base, the half-width of its 95 % interval over rows, and the share of the same top-1."""
    kls, same = [], []
    rows = zip(*(log_probabilities(path, ids, threads) for path in (base, other)), strict=True)
    for p, q in rows:
        kls.append(float((p.exp() * (p - q)).sum(-1)[:-1].mean()))
        same.append(float((p.argmax(-1) == q.argmax(-1))[:-1].float().mean()))
    half = 1.96 * float(np.std(kls, ddof=1)) / len(kls) ** 0.5
    return float(np.mean(kls)), half, float(np.mean(same))


def recipe_of(name: str, n: int) -> srcr.Recipe:
    """The recipe of "4", "0.25+4", "4v8" or "4d3" for ``n`` blocks: values' and down projections' bits behind
    the v, in the blocks where llama.cpp has more; those of all down projections behind the d."""
    sparsity, _, bits = name.rpartition("+")
    bits, _, down = bits.partition("d")
    bits, _, wide = bits.partition("v")
    prune = srcr.PruneSpec(sparsity=float(sparsity)) if sparsity else None
    overrides = {}
    if wide:
        overrides = {
            f"re:.*layers\\.{i}\\.(self_attn\\.v_proj|mlp\\.down_proj)": srcr.Override(
                bits=int(wide)
            )
            for i in range(n)
            if more_bits(i, n)
        }
    if down:
        overrides["*.down_proj"] = srcr.Override(bits=int(down))
    quant = srcr.QuantSpec(num_bits=int(bits))
    embeddings = srcr.QuantSpec("rtn", 8)
    return srcr.Recipe(prune, quant, overrides=overrides, embeddings=embeddings)


def main() -> None:
    """Write, quantize, compress, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("-o", "--work", type=Path, required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--types", default="Q3_K_M,Q4_0,Q4_K_M,Q5_K_M")
    parser.add_argument("--configs", default="4,0.25+4,5")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--eval-samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quiet = srcr.RunOptions(0, quiet=True)
    opened = open_model(options.model)
    calibration = Calibration(options.calibration, options.samples, options.seq_len)
    request = calibration_request(calibration, 0)
    tokens = load_text(request, TextModel(opened, "cpu"), "calibrate", quiet)
    text = EvaluationText(options.text, options.eval_samples, options.seq_len)
    unseen = load_text(evaluation_request(text, 0), TextModel(opened, "cpu"), "evaluate", quiet)
    base = options.work / "base"
    if not base.is_dir():
        base.mkdir(parents=True)
        get_format("gguf").write(Checkpoint.of(opened), base)
    files = {}
    weights: dict[str, Tensor] = {}
    for ftype in filter(None, options.types.split(",")):
        path = options.work / f"llama.cpp-{ftype}.gguf"
        if not path.exists():
            weights = weights or importance(opened, tokens)
            write_peer(opened, base, ftype, weights, path)
        files[f"llama.cpp {ftype}, importance matrix"] = path
    for name in filter(None, options.configs.split(",")):
        output = srcr.Output(options.work / f"srcr-{name}", format="gguf", resume=True)
        srcr.compress(
            opened, output, recipe_of(name, opened.config.num_hidden_layers), tokens, quiet
        )
        files[f"srcr {name}"] = output.folder / GGUF
    print(f"base {(base / GGUF).stat().st_size / 1e6:.1f} MB, {unseen.n_tokens} tokens")
    print("| file | MB | KL | same top-1 |")
    print("|---|---|---|---|")
    for name, path in files.items():
        kl, half, same = divergence(base / GGUF, path, unseen.input_ids, options.threads)
        size = path.stat().st_size / 1e6
        print(f"| {name} | {size:.1f} | {kl:.4f} ± {half:.4f} | {100 * same:.1f} % |", flush=True)


if __name__ == "__main__":
    main()
