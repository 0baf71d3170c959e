# SPDX-License-Identifier: Apache-2.0
"""The configuration that transformers would have of a GGUF's model, made from its key-values.

llama.cpp's keys are those of its converter (``conversion/base.py`` and the files of the architectures). What it leaves to
defaults of its own code (Gemma's query scale) is filled in as that code does.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from surgery_formats.containers.gguf.header import Header
from surgery_formats.containers.gguf.rope import rope_scaling
from surgery_formats.tensors.tensor import StoredTensor

__all__ = ["architecture_of", "model_config"]

_SIZES = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GRANITE = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
_GPT2 = {
    "n_embd": "embedding_length",
    "n_layer": "block_count",
    "n_inner": "feed_forward_length",
    "n_head": "attention.head_count",
    "n_positions": "context_length",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
}
_LAYER_NORMS = {"command-r": "layer_norm_eps", "phi2": "layer_norm_eps", "starcoder2": "norm_epsilon"}
"""What the epsilon of layer norms is called in the configurations of architectures that have them."""
_ACTIVATIONS = {"phi2": "gelu_new", "starcoder2": "gelu_pytorch_tanh"}
"""Of those whose activation is not SiLU; a GGUF does not say it."""
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "granite": "GraniteForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo": "OlmoForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "cohere": "CohereForCausalLM",
    "phi": "PhiForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
_MODEL_TYPES = {
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "gemma3": "gemma3_text",
    "command-r": "cohere",
    "phi2": "phi",
}
_ALSO = {"mixtral": "llama", "mistral": "llama"}
"""Types of models whose architecture in a GGUF is another's."""
_FLOAT32 = 3.4e38
_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
_LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}  # layers of the 27B models, whose queries are scaled by another number


def architecture_of(config: Mapping[str, Any]) -> str:
    """The architecture in a GGUF of a model with this configuration; empty for one without a table here."""
    if isinstance(name := config.get("general.architecture"), str):
        return name
    text = config.get("text_config")
    model_type = str((text if isinstance(text, Mapping) else config).get("model_type"))
    others = {theirs: name for name, theirs in _MODEL_TYPES.items()} | _ALSO
    return others.get(model_type, model_type if model_type in _CLASSES else "")


def model_config(header: Header, tensors: Sequence[StoredTensor] | None = None) -> dict[str, Any]:
    """The configuration; of an architecture without a model in transformers only the architecture.

    Args:
        header: With the key-values of the model.
        tensors: Of the model, if not all are in this file.
    """
    tensors = header.tensors if tensors is None else tensors
    name = header.value("general.architecture")
    config: dict[str, Any] = {"general.architecture": name}
    if not isinstance(name, str):
        return config
    names = {tensor.name: tensor for tensor in tensors}
    experts = value if _is_number(value := header.value(f"{name}.expert_count")) else 0
    model_type = "mixtral" if name == "llama" and experts else _MODEL_TYPES.get(name, name)
    if model_type not in _CLASSES:
        return config
    config |= {"model_type": model_type, "architectures": [_CLASSES[model_type]]}
    keys = _GPT2 if name == "gpt2" else _sizes_of(name)
    for key, suffix in keys.items():
        if _is_number(value := header.value(f"{name}.{suffix}")):
            config[key] = _plain(value)
    if experts:
        config["num_local_experts" if model_type == "mixtral" else "num_experts"] = experts
    config |= _vocabulary(header, names)
    config["dtype"] = "bfloat16" if any(tensor.packed_as == "BF16" for tensor in tensors) else "float16"
    if name != "gpt2":
        config |= _llama_like(header, name, config, names)
    return config


def _sizes_of(name: str) -> dict[str, str]:
    """Keys of the configuration, and those of a GGUF without the architecture in front."""
    keys = {**_SIZES, **(_GRANITE if name == "granite" else {})}
    if name in _LAYER_NORMS:
        del keys["rms_norm_eps"]
        keys[_LAYER_NORMS[name]] = "attention.layer_norm_epsilon"
    if name == "command-r":
        keys["logit_scale"] = "logit_scale"
    return keys


def _vocabulary(header: Header, names: Mapping[str, StoredTensor]) -> dict[str, Any]:
    found: dict[str, Any] = {"tie_word_embeddings": "output.weight" not in names}
    embedding = names.get("token_embd.weight")
    if embedding is not None and embedding.shape:
        found["vocab_size"] = embedding.shape[0]
    for key, token in _TOKENS.items():
        if _is_number(value := header.value(f"tokenizer.ggml.{token}_token_id")):
            found[key] = value
    return found


def _llama_like(
    header: Header, name: str, config: Mapping[str, Any], names: Mapping[str, StoredTensor]
) -> dict[str, Any]:
    """What differs between the decoders with Llama's configuration."""
    found: dict[str, Any] = {
        "hidden_act": _ACTIVATIONS.get(name, "silu"),
        "rope_theta": config.get("rope_theta", 10000.0),
    }
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    width = config.get("head_dim")
    if width is None and isinstance(heads, int) and isinstance(hidden, int) and heads:
        width = hidden // heads
    if name in ("llama", "granite"):
        found |= {"attention_bias": "blk.0.attn_q.bias" in names, "mlp_bias": "blk.0.ffn_gate.bias" in names}
    if name.startswith("qwen"):
        found["use_sliding_window"] = False  # llama.cpp has none for these
    if name.startswith("gemma"):
        found |= {"hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh", "head_dim": width}
    if name in _LARGEST_GEMMA and isinstance(width, int):
        largest = config.get("num_hidden_layers") == _LARGEST_GEMMA[name]
        found["query_pre_attn_scalar"] = width
        if largest and isinstance(heads, int) and isinstance(hidden, int) and heads:
            found["query_pre_attn_scalar"] = hidden // heads
    if name == "gemma3":
        found["rope_local_base_freq"] = _plain(header.value("gemma3.rope.freq_base_swa") or 10000.0)
    if name == "command-r":
        found["use_qk_norm"] = "blk.0.attn_q_norm.weight" in names
    if name == "phi2":
        rotated, up = header.value("phi2.rope.dimension_count"), names.get("blk.0.ffn_up.weight")
        if isinstance(rotated, int) and isinstance(width, int) and width:
            found["partial_rotary_factor"] = rotated / width
        if up is not None and up.shape:  # llama.cpp writes four times the hidden size, whatever it is
            found["intermediate_size"] = up.shape[0]
    if name == "phi3":
        found["sliding_window"] = config.get("sliding_window") or None
        found["original_max_position_embeddings"] = header.value("phi3.rope.scaling.original_context_length")
        rotated = header.value("phi3.rope.dimension_count")
        if isinstance(rotated, int) and isinstance(width, int) and rotated != width != 0:
            found["partial_rotary_factor"] = rotated / width
    if (scaling := rope_scaling(header, names, width, found["rope_theta"])) is not None:
        found["rope_scaling"] = scaling
    return {key: value for key, value in found.items() if value is not None or key == "sliding_window"}


def _is_number(value: Any) -> bool:
    """Whether a key-value is a number, or one for each layer; other types are not what llama.cpp writes there."""
    return isinstance(value, int | float | tuple) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    """A float32 as the shortest decimal that stands for it, as it was in the configuration it came from."""
    if isinstance(value, tuple):
        return value[0] if value and all(each == value[0] for each in value) else list(value)
    if not isinstance(value, float):
        return value
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if abs(short) < _FLOAT32 and struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value
