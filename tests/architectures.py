"""A tiny random model of every causal LM architecture that the installed transformers builds from a config.

Sizes are set by the names that configs give them; what an architecture needs besides is in ``SETTINGS``.
"""

import copy
import inspect
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

#: Every model_type.
ARCHITECTURES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
#: More parameters than any tiny model has.
TINY = 5_000_000
#: Value -> the names of the settings that get it, where a config has them.
SIZES: dict[int, str] = {
    0: "pad_token_id",
    1: "bos_token_id n_group topk_group n_shared_experts moe_num_shared_experts num_shared_experts "
       "first_k_dense_replace num_dense_layers",
    2: "eos_token_id num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
       "num_key_value_heads multi_query_group_num num_kv_heads num_experts_per_tok moe_topk "
       "num_experts_per_token moe_k top_k_experts",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
       "num_experts num_local_experts n_routed_experts moe_num_experts linear_num_heads "
       "linear_num_key_heads linear_num_value_heads",
    8: "head_dim d_kv attention_head_size qk_nope_head_dim v_head_dim qk_rope_head_dim "
       "query_pre_attn_scalar rotary_dim global_head_dim linear_head_dim linear_key_head_dim "
       "linear_value_head_dim ssm_state_size mamba_num_heads mamba_head_dim",
    16: "sliding_window attention_window_size attention_window q_lora_rank kv_lora_rank",
    24: "moe_intermediate_size",
    32: "hidden_size d_model n_embd dim embed_dim model_dim n_embed attention_hidden_size lru_width "
        "word_embed_proj_dim embedding_size kv_channels hidden_size_per_layer_input",
    48: "intermediate_size ffn_dim n_inner d_ff ffn_hidden_size d_inner decoder_ffn_dim encoder_ffn_dim "
        "shared_intermediate_size dense_intermediate_size shared_expert_intermediate_size inner_dim "
        "dim_ff dff moe_shared_expert_intermediate_size",
    64: "max_position_embeddings n_positions n_ctx max_seq_len sequence_length context_length seq_length",
    96: "vocab_size n_vocab vocab_size_per_layer_input",
}  # fmt: skip
NAMES = {name: value for value, names in SIZES.items() for name in names.split()}
_MLA = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "head_dim": 8, "num_key_value_heads": 4}
_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
#: What is not built here, and why.
NOT_BUILT = {
    "blt": "needs patch lengths",
    "cohere_compass_text": "transformers lacks a rope for one of its layer types",
    "dbrx": "transformers reads its rope from another config than it checks",
    "dots3_note": "sizes of its vision part and its text part depend on one another",
    "emu3": "its config is that of the whole, its causal LM takes that of the text part",
    "gemma3n": "needs timm",
    "gemma4_assistant": "drafts for another model, whose cache it reads",
    "gemma4_unified_assistant": "drafts for another model, whose cache it reads",
    "got_ocr2": "its vision part has no small size",
    "mllama": "its config is that of the whole, its causal LM takes that of the text part",
    "moss_transcribe_diarize": "its audio part has no small size",
    "musicgen": "its config is that of the whole, its causal LM takes that of the decoder",
    "musicgen_melody": "its config is that of the whole, its causal LM takes that of the decoder",
    "phi4_multimodal": "its adapters have no small size",
    "zamba": "the sizes of its shared blocks do not fit a tiny model",
}
#: Settings of one architecture, which go before those by name; None leaves a setting out.
SETTINGS: dict[str, dict[str, Any]] = {
    "axk1": _MLA, "axk2": _MLA, "deepseek_v2": _MLA, "deepseek_v3": _MLA, "deepseek_v32": _MLA,
    "glm4_moe_lite": _MLA, "glm_moe_dsa": _MLA, "minicpm3": _MLA, "youtu": _MLA,
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8,
              "attn_layer_indices": [1]},
    "granitemoehybrid": {
        "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8,
        "mamba_chunk_size": 8, "layer_types": ["mamba", "attention"],
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "bailing_hybrid": {"num_experts": 16},  # in eight groups
    "kimi_linear": {"num_experts": 4, "num_experts_per_token": 2},
    "kolibri1": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "zamba2": {
        "layer_types": ["mamba", "hybrid"], "layers_block_type": ["mamba", "hybrid"],
        "hybrid_layer_ids": [1], "num_mem_blocks": 1, "n_mamba_heads": 4, "mamba_headdim": 16,
        "mamba_d_state": 8, "mamba_ngroups": 1,
    },
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2,
                  "mamba_n_groups": 1, "mamba_d_ssm": 64, "mamba_chunk_size": 8},
    "fuyu": {"text_config": {"model_type": "persimmon", "vocab_size": 96, "hidden_size": 32,
                             "intermediate_size": 48, "num_hidden_layers": 2,
                             "num_attention_heads": 4, "max_position_embeddings": 64}},
    "zaya": {"num_experts_per_tok": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "reformer": {
        "is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "local"],
        "feed_forward_size": 48, "local_attn_chunk_length": 8, "attention_head_size": 8,
    },
    "gemma3": {"vision_config": _VISION, "mm_tokens_per_image": 4, "image_token_index": 95,
               "boi_token_index": 94, "eoi_token_index": 93},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX", "adapter_reduction_factor": 2},
    "roc_bert": {
        "pronunciation_vocab_size": 96, "shape_vocab_size": 96, "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "xlm": {"emb_dim": 32, "max_position_embeddings": 64},
    "longcat_flash": {
        **_MLA, "expert_ffn_hidden_size": 24, "ffn_hidden_size": 48, "zero_expert_num": 1,
        "n_routed_experts": 4, "num_hidden_layers": 2, "num_layers": 1,
    },
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 0, "laurel_rank": 8,
                     "layer_types": ["sliding_attention", "full_attention"] * 2,
                     "intermediate_size": 48, "activation_sparsity_pattern": [0.0] * 4},
    "git": {"vision_config": _VISION},
}  # fmt: skip


def tiny_architecture(kind: str, **settings: Any) -> Any:
    """A tiny random model of a ``model_type``, in evaluation mode; with some settings of its config.

    Raises:
        Exception: of any kind: transformers does not build it so.
    """
    given = SETTINGS.get(kind, {}) | settings
    config = CONFIG_MAPPING[kind](**_settings(CONFIG_MAPPING[kind], given))
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    size = sum(parameter.numel() for parameter in empty.parameters())
    assert size < TINY, f"{kind} has {size} parameters"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim in (2, 3):  # the default 0.02 makes every layer nearly nothing
                parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def _settings(cls: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a config class that :data:`NAMES` knows, and those of its decoder's own config."""
    known: set[str] = set()
    for base in cls.__mro__:
        known |= set(getattr(base, "__annotations__", {}))
        known |= set(inspect.signature(base.__init__).parameters)
    aliases = getattr(cls, "attribute_map", {})
    settings = {k: v for k, v in NAMES.items() if k in known and k not in aliases}
    given = dict(given)
    for name in ("text_config", "decoder"):
        part = getattr(cls, "sub_configs", {}).get(name)
        if part is not None and hasattr(part, "model_type"):
            settings[name] = _settings(part, given.pop(name, {}))
    return settings | given
