# SPDX-License-Identifier: Apache-2.0
"""onnxruntime-genai's builder: PEFT loads the adapter, and its scale is used; all but A and B is left out."""

from __future__ import annotations

from surgery.consumers.consumer import RuledConsumer, SourceRead, honoured, ignored, refused

__all__ = ["ONNXRUNTIME_GENAI"]

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
        "LoRA of an embedding": ignored("the embedding is written from the base's weight", "drop"),
        "LoRA of the head": honoured,
        "LoRA of one expert": ignored("experts are written from the base's weights", "drop"),
        "LoRA of stacked experts": ignored("experts are written from the base's weights", "drop"),
        "LoRA taken for experts": honoured,
        "LoRA of a turned weight": refused("it builds no model with such layers", "drop"),
        "LoRA of a convolution": ignored(_LEFT, "drop"),
        "LoRA on a changed base": honoured,  # PEFT takes the part away as it attaches the adapter
        "DoRA": ignored(f"{_LEFT}: no magnitudes", "lora"),
        "other kind": refused("layers of other kinds have no lora_A", "lora"),
        "bias of a LoRA": ignored(f"{_LEFT}: no bias of B", "drop"),
        "trained bias": honoured,  # PEFT puts it into the base's layer
        "saved norm": honoured,
        "saved head": honoured,
        "saved module": honoured,
        "saved vocabulary": ignored("the embedding is written from the base's weight", "drop"),
        "carried weight": honoured,
        "added rows": refused("PEFT finds another vocabulary", "drop"),
        "token rows": ignored("the embedding is written from the base's weight", "drop"),
        "virtual tokens": ignored("the builder knows no virtual tokens"),
        "pattern of targets": honoured,
        "no targets": honoured,
        "beyond the targets": ignored("PEFT leaves it out", "rewrite"),
        "missing fields": honoured,
        "bias setting": honoured,
        "promised modules": refused("PEFT asks for each of them", "rewrite"),
        "null patterns": refused("PEFT asks null for its keys", "rewrite"),
        "block-diagonal factors": refused("its factors have the sizes of blocks", "rewrite"),
        "bare names": ignored("PEFT finds none of its names", "rewrite"),
        "wrapped names": ignored("PEFT finds none of its names", "rewrite"),
        "doubled prefix": ignored("PEFT finds none of its names", "rewrite"),
        "names of an adapter": honoured,
        "targeted parameters": honoured,
        "added tokens": honoured,  # not looked at
        "pickled weights": honoured,
        "other weight files": refused("PEFT opens adapter_model.safetensors or adapter_model.bin", "rewrite"),
    },
)
