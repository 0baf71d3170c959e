# SPDX-License-Identifier: Apache-2.0
"""TensorRT-LLM: ``lora_alpha`` over each LoRA's own rank, or its root; ``alpha_pattern`` is not looked at."""

from __future__ import annotations

from surgery.consumers.consumer import RuledConsumer, SourceRead
from surgery.consumers.rules import honoured, ignored, refused
from surgery.consumers.scales import alpha_over_own_rank_or_root
from surgery.consumers.starts import BY_NAMES, lora_alone

__all__ = ["TENSORRT_LLM"]

_KEY = "'unsupported key ... from HF LoRA weights'"
_NAMES = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj gate_up_proj w1 w2 w3 gate"

TENSORRT_LLM = RuledConsumer(
    name="tensorrt-llm",
    title="TensorRT-LLM",
    version="1.0",
    oldest="1.0",
    sources=(
        SourceRead("NVIDIA/TensorRT-LLM", "007e181b", "tensorrt_llm/lora_manager.py", "LoraManager.load_from_hf"),
        SourceRead("NVIDIA/TensorRT-LLM", "007e181b", "tensorrt_llm/lora_manager.py", "iterate_hf_lora"),
    ),
    scale=alpha_over_own_rank_or_root,
    greatest_rank=64,
    leaves=frozenset(_NAMES.split()),
    other_leaf=refused("'hf_module is not in supported list'", "drop"),
    rules={
        **BY_NAMES,
        **lora_alone(refused, _KEY),
        "LoRA of an embedding": ignored("keys with embed_tokens are passed over", "drop"),
        "LoRA of the head": ignored("keys with lm_head are passed over", "drop"),
        "LoRA of stacked experts": refused(_KEY, "drop"),
        "LoRA of a turned weight": refused("'hf_module is not in supported list'", "drop"),
        "LoRA of a convolution": refused(_KEY, "drop"),
        "DoRA": ignored("it multiplies by the magnitudes as stored, which PEFT divides by the rows' norms", "lora"),
        "saved vocabulary": ignored("its PyTorch engine passes over lm_head and embed_tokens", "drop"),
        "added rows": ignored("its PyTorch engine passes over lm_head and embed_tokens", "drop"),
        "token rows": ignored("keys with embed_tokens are passed over", "drop"),
        "virtual tokens": refused("it loads LoRA alone"),
        "missing fields": refused("it asks for r and lora_alpha", "rewrite"),
        "block-diagonal factors": refused("its factors have the sizes of blocks", "rewrite"),
        "wrapped names": honoured,
        "doubled prefix": honoured,
        "names of an adapter": refused(_KEY, "rewrite"),
        "pickled weights": honoured,
        "other weight files": refused("'adapter_model file does not exist'", "rewrite"),
    },
)
