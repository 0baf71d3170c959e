# SPDX-License-Identifier: Apache-2.0
"""Which modules PEFT chooses by itself in a model type, where ``target_modules`` is null.

Copied from PEFT 0.21.2, ``peft/utils/constants.py``; a test holds the copy to the installed PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["DEFAULT_TARGETS", "WITH_DEFAULTS"]

DEFAULT_TARGETS: Mapping[str, tuple[str, ...] | str] = {
    "t5": ("q", "v"),
    "mt5": ("q", "v"),
    "bart": ("q_proj", "v_proj"),
    "gpt2": ("c_attn",),
    "bloom": ("query_key_value",),
    "blip-2": ("q", "v", "q_proj", "v_proj"),
    "opt": ("q_proj", "v_proj"),
    "gptj": ("q_proj", "v_proj"),
    "gpt_neox": ("query_key_value",),
    "gpt_neo": ("q_proj", "v_proj"),
    "bert": ("query", "value"),
    "roberta": ("query", "value"),
    "xlm-roberta": ("query", "value"),
    "electra": ("query", "value"),
    "deberta-v2": ("query_proj", "value_proj"),
    "deberta": ("in_proj",),
    "layoutlm": ("query", "value"),
    "llama": ("q_proj", "v_proj"),
    "llama4": ("q_proj", "v_proj"),
    "chatglm": ("query_key_value",),
    "gpt_bigcode": ("c_attn",),
    "mpt": ("Wqkv",),
    "RefinedWebModel": ("query_key_value",),
    "RefinedWeb": ("query_key_value",),
    "falcon": ("query_key_value",),
    "btlm": ("c_proj", "c_attn"),
    "codegen": ("qkv_proj",),
    "mistral": ("q_proj", "v_proj"),
    "mixtral": ("q_proj", "v_proj"),
    "stablelm": ("q_proj", "v_proj"),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "gemma": ("q_proj", "v_proj"),
    "gemma2": ("q_proj", "v_proj"),
    "gemma3_text": ("q_proj", "v_proj"),
    "gemma4": ".*language_model\\..*\\.(q_proj|v_proj)",
    "qwen2": ("q_proj", "v_proj"),
    "qwen3": ("q_proj", "v_proj"),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
}
"""Of LoRA, by model type: last names of modules, or a pattern of whole paths."""
WITH_DEFAULTS = frozenset(
    [
        "BOFT",
        "DEFT",
        "DELORA",
        "GLORA",
        "GRALORA",
        "HIRA",
        "HRA",
        "LILY",
        "LOHA",
        "LOKR",
        "LORA",
        "MISS",
        "OFT",
        "PEANUT",
        "POLY",
        "PSOFT",
        "RANDLORA",
        "ROAD",
        "SUPERTUNING",
        "TINYLORA",
        "UNILORA",
    ]
)
"""Kinds, by ``peft_type``, with the same choice."""
