"""Mixtures of experts in llama.cpp: what it takes for granted of them, their numbers, and the stacks that it
keeps the weights of a layer's experts in."""

from collections.abc import Mapping
from typing import Any

from srcr.errors import InputError
from srcr.formats.checkpoint import Contents
from srcr.formats.gguf.blocks import type_of
from srcr.models.topology import experts_module

#: The settings of a config that llama.cpp takes for granted, by the model_type of a mixture.
GRANTED: Mapping[str, Mapping[str, Any]] = {
    "granitemoe": {},
    "mixtral": {},
    "olmoe": {
        "norm_topk_prob": False,
        "clip_qkv": None,
        "attention_bias": False,
        "tie_word_embeddings": False,
    },
    "qwen2_moe": {
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
    },
    "qwen3_moe": {
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
    },
}


def check_mixture(config: Any) -> None:
    """Refuse a mixture that llama.cpp computes otherwise than transformers.

    Raises:
        InputError: names the setting.
    """
    settings = dict(GRANTED.get(config.model_type, {}))
    if config.model_type == "olmoe":
        settings["num_key_value_heads"] = config.num_attention_heads
    for key, granted in settings.items():
        value = getattr(config, key, granted)
        if value != granted:
            raise InputError(
                f"gguf: llama.cpp computes a {config.model_type} with {key} {granted}, and this model has "
                f"{value}: use --format compressed-tensors"
            )


def check_stacks(contents: Contents) -> None:
    """Refuse experts of a layer whose weights would be of different types.

    Raises:
        InputError: names the layer, and what to do.
    """
    kinds: dict[tuple[str, str], set[str]] = {}
    for name in filter(contents.topology.routed, contents.topology.linears()):
        scheme = contents.schemes.get(name)
        kind = "not quantized" if scheme is None else type_of(scheme).name
        kinds.setdefault((experts_module(name), name.rpartition(".")[2]), set()).add(kind)
    for (module, linear), different in kinds.items():
        if len(different) > 1:
            raise InputError(
                f"gguf: llama.cpp keeps the same weights of all experts of a layer in one tensor of one "
                f"type, and {module}.*.{linear} would be {' and '.join(sorted(different))}: let the patterns "
                "of overrides and --ignore name every expert of a layer, or use --format archive"
            )


def write_experts(writer: Any, config: Any) -> None:
    """Give a ``gguf.GGUFWriter`` the numbers of a mixture; nothing of a model without experts."""
    if config.model_type not in GRANTED:
        return
    count = getattr(config, "num_local_experts", None) or config.num_experts
    writer.add_expert_count(count)
    writer.add_expert_used_count(config.num_experts_per_tok)
    for key, add in (
        ("moe_intermediate_size", writer.add_expert_feed_forward_length),
        ("shared_expert_intermediate_size", writer.add_expert_shared_feed_forward_length),
    ):
        if getattr(config, key, None):
            add(getattr(config, key))
