# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of every family that has a recipe: real classes, every parameter random, biases and norms included."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import transformers

__all__ = ["DECODERS", "ENCODERS", "config_of", "load", "save"]

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

_LM: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MHA = {key: value for key, value in _LM.items() if key != "num_key_value_heads"}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 10 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
    "original_max_position_embeddings": 16,
}


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **more}


DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _LM),
    "llama-bias": ("LlamaForCausalLM", {**_LM, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-llama3": ("LlamaForCausalLM", {**_LM, "rope_parameters": _LLAMA3}),
    "llama-yarn": ("LlamaForCausalLM", {**_LM, "rope_parameters": _YARN}),
    "llama-linear": ("LlamaForCausalLM", {**_LM, "rope_parameters": _rope("linear", factor=2.0)}),
    "llama-dynamic": ("LlamaForCausalLM", {**_LM, "rope_parameters": _rope("dynamic", factor=2.0)}),
    "mistral": ("MistralForCausalLM", {**_LM, "sliding_window": 4}),
    "qwen2": ("Qwen2ForCausalLM", {**_LM, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {**_LM, "head_dim": 16}),
    "gemma": ("GemmaForCausalLM", {**_LM, "head_dim": 16}),
    "gemma2": (
        "Gemma2ForCausalLM",
        {
            **_LM,
            "head_dim": 16,
            "sliding_window": 4,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        {
            **_LM,
            "head_dim": 16,
            "sliding_window": 4,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi3": ("Phi3ForCausalLM", {**_LM, "sliding_window": 6}),
    "phi3-long": ("Phi3ForCausalLM", {**_LM, "rope_parameters": _LONG, "original_max_position_embeddings": 16}),
    "olmo": ("OlmoForCausalLM", _LM),
    "olmo2": ("Olmo2ForCausalLM", _LM),
    "granite": (
        "GraniteForCausalLM",
        {
            **_LM,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.7,
            "logits_scaling": 2.0,
        },
    ),
    "smollm3": ("SmolLM3ForCausalLM", {**_LM, "no_rope_layers": [1, 0]}),
    "stablelm": ("StableLmForCausalLM", {**_LM, "partial_rotary_factor": 0.25, "use_qkv_bias": True}),
    "stablelm-parallel": (
        "StableLmForCausalLM",
        {**_LM, "partial_rotary_factor": 0.5, "use_parallel_residual": True, "qk_layernorm": True},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 101, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "eos_token_id": 2},
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", {**_MHA, "rotary_pct": 0.25}),
    "gpt-neox-serial": ("GPTNeoXForCausalLM", {**_MHA, "rotary_pct": 1.0, "use_parallel_residual": False}),
    "opt": ("OPTForCausalLM", {**_MHA, "ffn_dim": 88, "word_embed_proj_dim": 64}),
    "opt-350m": ("OPTForCausalLM", {**_MHA, "ffn_dim": 88, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
}
_LABELS = {"num_labels": 3}
_DISTIL = {"vocab_size": 101, "dim": 64, "hidden_dim": 88, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", _MHA),
    "bert-sequence": ("BertForSequenceClassification", {**_MHA, **_LABELS}),
    "bert-token": ("BertForTokenClassification", {**_MHA, **_LABELS}),
    "roberta": ("RobertaModel", {**_MHA, "pad_token_id": 1, "bos_token_id": 0, "type_vocab_size": 1}),
    "roberta-sequence": (
        "RobertaForSequenceClassification",
        {**_MHA, **_LABELS, "pad_token_id": 1, "bos_token_id": 0, "type_vocab_size": 1},
    ),
    "roberta-token": ("RobertaForTokenClassification", {**_MHA, **_LABELS, "pad_token_id": 1, "type_vocab_size": 1}),
    "xlm-roberta": ("XLMRobertaModel", {**_MHA, "pad_token_id": 1, "type_vocab_size": 1}),
    "distilbert": ("DistilBertModel", _DISTIL),
    "distilbert-sequence": ("DistilBertForSequenceClassification", {**_DISTIL, **_LABELS}),
    "distilbert-token": ("DistilBertForTokenClassification", {**_DISTIL, **_LABELS}),
}


def config_of(name: str) -> tuple[str, Any]:
    """The class and the configuration of a model of the zoo."""
    cls, fields = (DECODERS | ENCODERS)[name]
    return cls, getattr(transformers, cls).config_class(**fields)


@functools.cache
def load(name: str) -> Any:
    """The model, in float32, its parameters random but repeatable."""
    cls, config = config_of(name)
    config._attn_implementation = "eager"
    model = getattr(transformers, cls)(config).eval()
    generator = torch.Generator().manual_seed(17)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * 0.15)
            else:
                parameter.add_(noise * 0.2)
    return model


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Write the model as ``save_pretrained`` does."""
    model = load(name)
    if dtype is not torch.float32:
        import copy

        model = copy.deepcopy(model).to(dtype)
    model.save_pretrained(folder, **options)
    return folder
