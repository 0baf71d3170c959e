# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of the types that the installed transformers knows, made from their configurations' defaults."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

__all__ = ["causal_types", "multimodal_types", "tiny"]

_SMALL: Mapping[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("head_dim", "q_lora_rank", "kv_lora_rank", "v_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "bos_token_id"), 1),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"), 48),
    "hidden_dim": 64,
    "vocab_size": 101,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
    "image_size": 16,
    "patch_size": 8,
    "num_channels": 3,
    "max_source_positions": 32,
    "num_mel_bins": 8,
}
"""Numbers that configurations have under these names, whatever their type."""

_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_MLA = {"qk_rope_head_dim": 8, "num_key_value_heads": 4, "qk_head_dim": 16, "head_dim": 8}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "layer_types": ["mamba", "attention"]}
_WITH_LATENTS = (
    *("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3"),
    *("axk1", "axk2", "youtu"),
)
_SPECIAL: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text"), _HYBRID | _LINEAR),
    **dict.fromkeys(_WITH_LATENTS, _MLA),
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "falcon": {"head_dim": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32},
    "granitemoehybrid": _MAMBA,
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "state_size": 8, "n_groups": 2},
}
"""Numbers that only some types need."""


def causal_types() -> Iterator[str]:
    """Types with a model for causal language modelling that is no composite."""
    return iter(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def multimodal_types() -> Iterator[str]:
    """Types with a model of images and text."""
    return iter(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def _small(kind: type, special: Mapping[str, Any]) -> dict[str, Any]:
    default = kind()
    numbers = {
        name: value
        for name, value in _SMALL.items()
        if not isinstance(found := getattr(default, name, False), bool) and isinstance(found, int | type(None))
    }
    numbers |= {name: value for name, value in special.items() if value is None or hasattr(default, name)}
    return {name: value for name, value in numbers.items() if value is not None}


def tiny(model_type: str, *, seed: int = 0) -> Any:
    """A random model of a type, on the CPU in float32, in inference mode."""
    kind = transformers.CONFIG_MAPPING[model_type]
    special = _SPECIAL.get(model_type, {})
    if parts := getattr(kind, "sub_configs", {}):
        default = kind()
        below = {}
        for name in parts:
            sub = getattr(default, name, None)
            if sub is not None:
                below[name] = {"model_type": sub.model_type} | _small(type(sub), _SPECIAL.get(sub.model_type, {}))
        config = kind(**below, **_small(kind, special))
        name = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type)
    else:
        config = kind(**_small(kind, special))
        name = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    name = name[0] if isinstance(name, tuple | list) else name
    made = getattr(transformers, str(name))
    with torch.device("meta"):
        numbers = sum(parameter.numel() for parameter in made(config).parameters())
    if numbers > 6_000_000:
        raise ValueError(f"{numbers} parameters are no tiny model")
    torch.manual_seed(seed)
    model = made(config).eval().float()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.08
    model.tie_weights()
    return model
