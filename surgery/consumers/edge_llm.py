# SPDX-License-Identifier: Apache-2.0
"""TensorRT Edge-LLM: ``lora_alpha / r`` for all, in half precision; norms and the head are dropped without a word."""

from __future__ import annotations

from surgery.consumers.consumer import RuledConsumer, SourceRead, honoured, ignored, refused
from surgery.consumers.scales import alpha_over_r

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
        "LoRA of an embedding": ignored(_UNBOUND, "drop"),
        "LoRA of the head": ignored("tensors of lm_head are not kept", "drop"),
        "LoRA of one expert": ignored(_UNBOUND, "drop"),
        "LoRA of stacked experts": ignored(_UNBOUND, "drop"),
        "LoRA taken for experts": honoured,
        "LoRA of a turned weight": honoured,
        "LoRA of a convolution": ignored(_UNBOUND, "drop"),
        "LoRA on a changed base": ignored("it takes the factors for a LoRA of the base as it is", "lora"),
        "DoRA": ignored(_UNBOUND, "lora"),
        "other kind": refused("its configuration lacks 'r' or 'lora_alpha'", "lora"),
        "bias of a LoRA": ignored(_UNBOUND, "drop"),
        "trained bias": ignored(_UNBOUND, "drop"),
        "saved norm": ignored("tensors of norms are not kept", "drop"),
        "saved head": ignored(_UNBOUND, "drop"),
        "saved module": ignored(_UNBOUND, "saved"),
        "saved vocabulary": ignored(_UNBOUND, "drop"),
        "carried weight": honoured,
        "added rows": ignored(_UNBOUND, "drop"),
        "token rows": ignored(_UNBOUND, "drop"),
        "virtual tokens": refused("it loads LoRA alone"),
        "pattern of targets": honoured,  # it goes by the tensors' names
        "no targets": honoured,
        "beyond the targets": honoured,
        "missing fields": refused("its configuration lacks 'r' or 'lora_alpha'", "rewrite"),
        "bias setting": honoured,
        "promised modules": honoured,
        "null patterns": honoured,
        "block-diagonal factors": refused("its factors have the sizes of blocks", "rewrite"),
        "bare names": honoured,
        "wrapped names": ignored(_UNBOUND, "rewrite"),
        "doubled prefix": ignored(_UNBOUND, "rewrite"),
        "names of an adapter": ignored(_UNBOUND, "rewrite"),
        "targeted parameters": honoured,
        "added tokens": honoured,  # not looked at
        "pickled weights": refused("it opens adapter_model.safetensors", "rewrite"),
        "other weight files": refused("it opens adapter_model.safetensors", "rewrite"),
    },
)
