# SPDX-License-Identifier: Apache-2.0
"""onnxruntime-genai's builder: PEFT loads the adapter, and its scale is used; all but A and B is left out."""

from __future__ import annotations

from surgery.consumers.consumer import RuledConsumer, SourceRead
from surgery.consumers.rules import ignored, refused
from surgery.consumers.starts import BY_PEFT

__all__ = ["ONNXRUNTIME_GENAI"]

_EMBEDDING = "the embedding is written from the base's weight"
_EXPERTS = "experts are written from the base's weights"
_LEFT = "a branch of the graph is lora_A, lora_B and PEFT's scale"

ONNXRUNTIME_GENAI = RuledConsumer(
    name="onnxruntime-genai",
    title="onnxruntime-genai builder",
    version="0.18.0",
    oldest="0.18.0",
    sources=(
        SourceRead("onnxruntime-genai", "0.18.0", "onnxruntime_genai/models/builders/base.py", "make_matmul_lora"),
        SourceRead("onnxruntime-genai", "0.18.0", "onnxruntime_genai/models/builders/base.py", "load_weights"),
    ),
    rules={
        **BY_PEFT,
        "LoRA of an embedding": ignored(_EMBEDDING, "drop"),
        "LoRA of a convolution": ignored(_LEFT, "drop"),
        "LoRA of one expert": ignored(_EXPERTS, "drop"),
        "LoRA of stacked experts": ignored(_EXPERTS, "drop"),
        "LoRA of a turned weight": refused("it builds no model with such layers", "drop"),
        "DoRA": ignored(f"{_LEFT}: no magnitudes", "lora"),
        "other kind": refused("layers of other kinds have no lora_A", "lora"),
        "bias of a LoRA": ignored(f"{_LEFT}: no bias of B", "drop"),
        "saved vocabulary": ignored(_EMBEDDING, "drop"),
        "token rows": ignored(_EMBEDDING, "drop"),
        "virtual tokens": ignored("the builder knows no virtual tokens"),
        "block-diagonal factors": refused("its factors have the sizes of blocks", "rewrite"),
    },
)
