"""For tests, ours and others': tiny models of many families, and suites a method must pass."""

from pathlib import Path
from typing import Any

import torch

from srcr.formats import Format
from srcr.formats.checkpoint import block_tensors, pack
from srcr.formats.journal import MARK, Journal
from srcr.methods.joint import compress_unit
from srcr.models.weights import ModelWeights
from srcr.numerics import masks
from srcr.types import CompressedWeight, LayerPlan, LayerStats, PruneSpec, QuantSpec, SweepSpec

_COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED: dict[str, Any] = _SIZES | {"num_key_value_heads": 2, "head_dim": 8}

#: Family -> (model_type of transformers' AutoConfig, its settings).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GROUPED),
    "mistral": ("mistral", _GROUPED | {"sliding_window": 16}),
    "qwen2": ("qwen2", _GROUPED),
    "qwen3": ("qwen3", _GROUPED),
    "gemma2": ("gemma2", _GROUPED | {"query_pre_attn_scalar": 8, "sliding_window": 16}),
    "gemma3": ("gemma3_text", _GROUPED | {"query_pre_attn_scalar": 8, "sliding_window": 16}),
    "phi3": ("phi3", _SIZES | {"num_key_value_heads": 2}),
    "opt": (
        "opt",
        {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    ),
    "gpt_neox": ("gpt_neox", _SIZES),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}  # fmt: skip


def tiny_model(
    family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> Any:
    """A random causal LM of a family, two blocks of width 32 (``changes``: of its config), in evaluation
    mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, settings = FAMILIES[family]
    config = AutoConfig.for_model(kind, **(_COMMON | settings | changes))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # the default 0.02 makes every layer nearly nothing
            if parameter.ndim == 2:
                parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
    return model.to(dtype).eval()


def save_tiny_model(
    folder: Path,
    family: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Save a tiny model as a checkpoint folder, without a tokenizer."""
    tiny_model(family, dtype, seed, **changes).save_pretrained(folder)
    return folder


def check_pruner(name: str) -> None:
    """Conformance of a pruner: exact counts, exact zeros, N:M honoured, finite, repeatable."""
    W, stats = _layer()
    for structure, sparsity in ((masks.UNSTRUCTURED, 0.3), ("2:4", 0.5), ("3:4", 0.25)):
        plan = LayerPlan("layer", PruneSpec.of(name, sparsity, structure))
        first, second = (
            compress_unit({"layer": W}, stats, {"layer": plan}, SweepSpec(), torch.float32)["layer"]
            for _ in range(2)
        )
        out = first.dequantize()
        assert first.mask is not None
        assert int((~first.mask).sum()) == masks.count_pruned(sparsity, W.numel())
        assert bool((out[~first.mask] == 0).all())
        assert bool(torch.isfinite(out).all())
        assert torch.equal(out, second.dequantize())
        pattern = masks.parse_structure(structure)
        if pattern is not None:
            kept = first.mask.view(W.shape[0], -1, pattern[1]).sum(-1)
            assert bool((kept == pattern[0]).all())


def check_quantizer(name: str) -> None:
    """Conformance of a quantizer: codes in range, few enough values a row, finite, repeatable."""
    W, stats = _layer()
    for bits in range(2, 9):
        for symmetric in (True, False):
            plan = LayerPlan("layer", None, QuantSpec(name, bits, -1, symmetric))
            first, second = (
                compress_unit({"layer": W}, stats, {"layer": plan}, SweepSpec(), torch.float32)[
                    "layer"
                ]
                for _ in range(2)
            )
            assert first.codes is not None
            assert int(first.codes.min()) >= -(2 ** (bits - 1))
            assert int(first.codes.max()) < 2 ** (bits - 1)
            out = first.dequantize()
            assert all(len(row.unique()) <= 2**bits for row in out)
            assert bool(torch.isfinite(out).all())
            assert torch.equal(out, second.dequantize())


def _layer() -> tuple[torch.Tensor, LayerStats]:
    """A random weight [12, 32] and the moments of 256 correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    return torch.randn(12, 32, generator=generator), LayerStats(x.T @ x, 256, x.T @ x)


def write_weights(
    folder: Path, model: Any, compressed: dict[str, CompressedWeight], fmt: Format
) -> None:
    """A model's weights as :func:`srcr.compress` writes them, into an empty folder."""
    source = ModelWeights(model)
    with Journal(folder) as journal:
        journal.begin({})
        for index in range(len(source.topology.blocks)):
            journal.add(block_tensors(source, index, compressed, fmt))
        pack(journal, source)
    (folder / MARK).unlink()
