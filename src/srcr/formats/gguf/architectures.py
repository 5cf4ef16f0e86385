"""What llama.cpp calls the models that it runs, their numbers, and their tensors."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from srcr.errors import InputError
from srcr.formats.gguf.mixtures import check_mixture, write_experts
from srcr.models.config import config_of


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp runs a model: its ``name`` there; whether the rows of q and k lie ``interleaved``, a
    number of the first half of a head beside that of the second; ``norm_offset``: what is added to the
    weights of norms."""

    name: str
    interleaved: bool = False
    norm_offset: float = 0.0


#: By the model_type of transformers.
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", interleaved=True),
    "mistral": Architecture("llama", interleaved=True),
    "mixtral": Architecture("llama", interleaved=True),
    "qwen2": Architecture("qwen2"),
    "qwen2_moe": Architecture("qwen2moe"),
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3moe"),
    "gemma3_text": Architecture("gemma3", norm_offset=1.0),
    "granitemoe": Architecture("granitemoe", interleaved=True),
    "olmoe": Architecture("olmoe"),
    "phi3": Architecture("phi3"),
}
#: Blocks of Gemma 3 between two that see everything.
GEMMA3_PATTERN = 6
#: Blocks of Gemma-3-27B, whose attention llama.cpp scales in another way.
GEMMA3_27B = 62
#: The number of an expert in a tensor's name.
EXPERT = re.compile(r"\.experts\.(\d+)\.")
#: What the tensors of routers are called in llama.cpp.
ROUTERS = "ffn_gate_inp"


def library() -> Any:
    """The package gguf.

    Raises:
        InputError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise InputError("--format gguf needs the package gguf: pip install 'srcr[gguf]'") from None
    return gguf


def architecture_of(model_type: str) -> Architecture:
    """The architecture for a model_type.

    Raises:
        InputError: llama.cpp has none that srcr writes.
    """
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    raise InputError(
        f"gguf: srcr writes {', '.join(sorted(ARCHITECTURES))} for llama.cpp, and this model is a "
        f"{model_type}: use --format compressed-tensors"
    )


def check_config(config: Any) -> None:
    """Refuse what llama.cpp would compute otherwise than transformers.

    Raises:
        InputError: says what.
    """
    architecture_of(config.model_type)
    gemma = config.model_type == "gemma3_text"
    act = config.hidden_activation if gemma else config.hidden_act
    expected = ("gelu_pytorch_tanh",) if gemma else ("silu", "swish")
    if act not in expected:
        raise InputError(f"gguf: llama.cpp computes {expected[0]} here, and the model has {act!r}")
    kind = _rope(config).get("rope_type", "default")
    known = ("default", "longrope") if config.model_type == "phi3" else tuple(_ROPE)
    if kind not in known:
        raise InputError(f"gguf: RoPE of type {kind!r} is not written yet, but {', '.join(known)}")
    if gemma:
        _check_gemma3(config)
    check_mixture(config)


def _check_gemma3(config: Any) -> None:
    pattern = [
        "full_attention" if (i + 1) % GEMMA3_PATTERN == 0 else "sliding_attention"
        for i in range(config.num_hidden_layers)
    ]
    if list(config.layer_types) != pattern:
        raise InputError(
            f"gguf: llama.cpp lets every {GEMMA3_PATTERN}th block of Gemma 3 see everything, and here they "
            "lie otherwise"
        )
    large = config.num_hidden_layers == GEMMA3_27B
    size = config.hidden_size / config.num_attention_heads if large else config.head_dim
    if config.query_pre_attn_scalar != size:
        raise InputError(
            f"gguf: llama.cpp divides attention by the root of {size:g}, and the model by that of "
            f"{config.query_pre_attn_scalar:g}"
        )


def _rope(config: Any) -> Mapping[str, Any]:
    """RoPE's parameters, of models with several kinds of blocks those of full attention."""
    parameters: Mapping[str, Any] = config.rope_parameters or {}
    full: Mapping[str, Any] = parameters.get("full_attention", parameters)
    return full


def _head_dim(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def write_metadata(writer: Any, config: Any) -> None:
    """Give a ``gguf.GGUFWriter`` the numbers of a model, under the keys of llama.cpp's own converter."""
    rope, head_dim = _rope(config), _head_dim(config)
    writer.add_type("model")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    share = rope.get("partial_rotary_factor") or 1.0
    if config.model_type != "gemma3_text":
        writer.add_rope_dimension_count(int(share * head_dim))
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    _ROPE[rope.get("rope_type", "default")](writer, rope, config)
    local = (config.rope_parameters or {}).get("sliding_attention")
    if local is not None:
        writer.add_rope_freq_base_swa(float(local["rope_theta"]))
    if config.model_type in ("gemma3_text", "phi3"):
        writer.add_sliding_window(config.sliding_window or 0)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.model_type == "granitemoe":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    write_experts(writer, config)


def _default(writer: Any, rope: Mapping[str, Any], config: Any) -> None:
    """Nothing more to say; Llama 3's factors are a tensor."""
    if config.model_type == "phi3":
        writer.add_rope_scaling_orig_ctx_len(_original_context(rope, config))


def _linear(writer: Any, rope: Mapping[str, Any], config: Any) -> None:
    from gguf import RopeScalingType

    writer.add_rope_scaling_type(RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(float(rope["factor"]))


def _yarn(writer: Any, rope: Mapping[str, Any], config: Any) -> None:
    from gguf import RopeScalingType

    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(float(rope["factor"]))
    writer.add_rope_scaling_orig_ctx_len(_original_context(rope, config))
    for key, add in (
        ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
        ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
        ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
    ):
        if rope.get(key) is not None:
            add(float(rope[key]))


def _longrope(writer: Any, rope: Mapping[str, Any], config: Any) -> None:
    from gguf import RopeScalingType

    original = _original_context(rope, config)
    scale = config.max_position_embeddings / original
    factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_rope_scaling_attn_factors(float(rope.get("attention_factor") or factor))


def _original_context(rope: Mapping[str, Any], config: Any) -> int:
    known = rope.get("original_max_position_embeddings")
    known = known or getattr(config, "original_max_position_embeddings", None)
    return int(known or config.max_position_embeddings)


#: What to say of RoPE, by its type.
_ROPE: Mapping[str, Callable[[Any, Mapping[str, Any], Any], None]] = {
    "default": _default,
    "llama3": _default,
    "linear": _linear,
    "yarn": _yarn,
    "longrope": _longrope,
}


def rope_tensors(config: Any) -> dict[str, Tensor]:
    """What llama.cpp divides RoPE's frequencies by, float32 [head size / 2] each, by its tensors' names."""
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    if kind == "longrope":
        return {
            f"rope_factors_{which}.weight": torch.tensor(
                rope[f"{which}_factor"], dtype=torch.float32
            )
            for which in ("long", "short")
        }
    return {"rope_freqs.weight": _llama3_factors(rope, config)} if kind == "llama3" else {}


def _llama3_factors(rope: Mapping[str, Any], config: Any) -> Tensor:
    """Long waves are slowed by the whole factor, short ones not at all, those between by a part."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    dim = _head_dim(config)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    factors: Tensor = plain / scaled
    return factors


class TensorNames:
    """The tensors of a model in llama.cpp, and how their rows lie there."""

    def __init__(self, config: Any) -> None:
        gguf = library()
        self._config = config
        self._arch = architecture_of(config.model_type)
        key = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == self._arch.name)
        self._map = gguf.get_tensor_name_map(key, config.num_hidden_layers)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "TensorNames":
        """The names for a config.json."""
        return cls(config_of(config))

    def name(self, name: str) -> str:
        """A tensor's name in llama.cpp; experts' have that of their stack.

        Raises:
            InputError: it has no place there.
        """
        alone = EXPERT.sub(".experts.", name).replace(".block_sparse_moe.", ".mlp.")
        mapped: str | None = self._map.get_name(alone, try_suffixes=(".weight", ".bias"))
        if mapped is None:
            raise InputError(f"gguf: llama.cpp has no tensor for {name}: use --format dense")
        return mapped

    def expert(self, name: str) -> int | None:
        """The place of a tensor in its stack: its expert's number; None where it is no expert's."""
        match = EXPERT.search(name)
        return None if match is None else int(match[1])

    def is_float32(self, name: str, dimensions: int) -> bool:
        """Whether llama.cpp wants a tensor of so many dimensions in float32, whatever the model has: norms,
        biases and routers."""
        return dimensions == 1 or ROUTERS in self.name(name)

    def row_order(self, name: str) -> Tensor | None:
        """Which row of a tensor each of llama.cpp's is, int64 [rows]; None: they lie as they do."""
        owner = name.rpartition(".")[0].rpartition(".")[2]
        if not self._arch.interleaved or owner not in ("q_proj", "k_proj"):
            return None
        config, size = self._config, _head_dim(self._config)
        heads = config.num_attention_heads if owner == "q_proj" else config.num_key_value_heads
        rows = torch.arange(heads * size).view(heads, 2, size // 2)
        return rows.transpose(1, 2).reshape(-1)

    def offset(self, name: str) -> float:
        """What llama.cpp wants added to a tensor."""
        return self._arch.norm_offset if name.endswith("norm.weight") else 0.0
