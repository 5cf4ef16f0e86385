"""Tiny random models of many families.

Their weights never change from version to version: what is compressed of them can be compared byte by byte.
"""

from pathlib import Path
from typing import Any

import torch

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
    """A random causal LM of a family, two blocks of width 32, in evaluation mode. ``changes`` are keys of its
    config."""
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
    """``folder``, with a tiny model saved there as a checkpoint, without a tokenizer."""
    tiny_model(family, dtype, seed, **changes).save_pretrained(folder)
    return folder
