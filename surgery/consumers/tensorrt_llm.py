# SPDX-License-Identifier: Apache-2.0
"""TensorRT-LLM: ``lora_alpha`` over each LoRA's own rank, or its root; ``alpha_pattern`` is not looked at."""

from __future__ import annotations

from surgery.consumers.consumer import RuledConsumer, SourceRead, honoured, ignored, refused
from surgery.consumers.scales import alpha_over_own_rank_or_root

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
        "LoRA of an embedding": ignored("keys with embed_tokens are passed over", "drop"),
        "LoRA of the head": ignored("keys with lm_head are passed over", "drop"),
        "LoRA of one expert": honoured,
        "LoRA of stacked experts": refused(_KEY, "drop"),
        "LoRA taken for experts": honoured,
        "LoRA of a turned weight": refused("'hf_module is not in supported list'", "drop"),
        "LoRA of a convolution": refused(_KEY, "drop"),
        "LoRA on a changed base": ignored("it takes the factors for a LoRA of the base as it is", "lora"),
        "DoRA": ignored("it multiplies by the magnitudes as stored, which PEFT divides by the rows' norms", "lora"),
        "other kind": refused(_KEY, "lora"),
        "bias of a LoRA": refused(_KEY, "drop"),
        "trained bias": refused(_KEY, "drop"),
        "saved norm": refused(_KEY, "drop"),
        "saved head": refused(_KEY, "drop"),
        "saved module": refused(_KEY, "saved"),
        "saved vocabulary": ignored("its PyTorch engine passes over lm_head and embed_tokens", "drop"),
        "carried weight": honoured,
        "added rows": ignored("its PyTorch engine passes over lm_head and embed_tokens", "drop"),
        "token rows": ignored("keys with embed_tokens are passed over", "drop"),
        "virtual tokens": refused("it loads LoRA alone"),
        "pattern of targets": honoured,  # it goes by the tensors' names
        "no targets": honoured,
        "beyond the targets": honoured,
        "missing fields": refused("it asks for r and lora_alpha", "rewrite"),
        "bias setting": honoured,
        "promised modules": honoured,
        "null patterns": honoured,
        "block-diagonal factors": refused("its factors have the sizes of blocks", "rewrite"),
        "bare names": honoured,
        "wrapped names": honoured,
        "doubled prefix": honoured,
        "names of an adapter": refused(_KEY, "rewrite"),
        "targeted parameters": honoured,
        "added tokens": honoured,  # not looked at
        "pickled weights": honoured,
        "other weight files": refused("'adapter_model file does not exist'", "rewrite"),
    },
)
