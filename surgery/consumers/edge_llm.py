# SPDX-License-Identifier: Apache-2.0
"""TensorRT Edge-LLM: ``lora_alpha / r`` for all, in half precision; norms and the head are dropped without a word."""

from __future__ import annotations

from surgery.consumers.consumer import RuledConsumer, SourceRead
from surgery.consumers.rules import ignored, refused
from surgery.consumers.scales import alpha_over_r
from surgery.consumers.starts import BY_NAMES, lora_alone

__all__ = ["EDGE_LLM"]

_UNBOUND = "it is copied, and no input of the graph has its name"

EDGE_LLM = RuledConsumer(
    name="edge-llm",
    title="TensorRT Edge-LLM",
    version="0.11.0",
    oldest="0.11.0",
    sources=(
        SourceRead("NVIDIA/TensorRT-Edge-LLM", "150230fa", "tensorrt_edgellm/lora/lora.py", "_process_tensor"),
        SourceRead("NVIDIA/TensorRT-Edge-LLM", "150230fa", "tensorrt_edgellm/lora/lora.py", "_should_keep_tensor"),
    ),
    scale=alpha_over_r,
    one_rank=refused("it turns a factor by whether a side of it is r", "pad"),
    rules={
        **BY_NAMES,
        **lora_alone(ignored, _UNBOUND),
        "LoRA of an embedding": ignored(_UNBOUND, "drop"),
        "LoRA of the head": ignored("tensors of lm_head are not kept", "drop"),
        "LoRA of one expert": ignored(_UNBOUND, "drop"),
        "LoRA of stacked experts": ignored(_UNBOUND, "drop"),
        "LoRA of a convolution": ignored(_UNBOUND, "drop"),
        "other kind": refused("its configuration lacks 'r' or 'lora_alpha'", "lora"),
        "saved norm": ignored("tensors of norms are not kept", "drop"),
        "saved vocabulary": ignored(_UNBOUND, "drop"),
        "virtual tokens": refused("it loads LoRA alone"),
        "missing fields": refused("its configuration lacks 'r' or 'lora_alpha'", "rewrite"),
        "block-diagonal factors": refused("its factors have the sizes of blocks", "rewrite"),
        "wrapped names": ignored(_UNBOUND, "rewrite"),
        "doubled prefix": ignored(_UNBOUND, "rewrite"),
        "names of an adapter": ignored(_UNBOUND, "rewrite"),
        "pickled weights": refused("it opens adapter_model.safetensors", "rewrite"),
        "other weight files": refused("it opens adapter_model.safetensors", "rewrite"),
    },
)
