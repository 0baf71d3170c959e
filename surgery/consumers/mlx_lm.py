# SPDX-License-Identifier: Apache-2.0
"""mlx-lm: folders of its own format, with one rank and one scale; it refuses what is no adapter's parameter."""

from __future__ import annotations

from surgery.consumers.consumer import RuledConsumer, SourceRead, honoured, refused

__all__ = ["MLX_LM"]

_NOT = "'not an adapter parameter in the model'"

MLX_LM = RuledConsumer(
    name="mlx-lm",
    title="mlx-lm",
    version="0.32.2",
    oldest="0.32.0",
    sources=(
        SourceRead("mlx-lm", "0.32.2", "mlx_lm/tuner/utils.py", "load_adapters, linear_to_lora_layers"),
        SourceRead("mlx-lm", "0.32.2", "mlx_lm/tuner/lora.py", "LoRALinear, LoRASwitchLinear, LoRAEmbedding"),
    ),
    format="mlx",
    reads=frozenset({"mlx"}),
    rules={
        "LoRA of an embedding": honoured,
        "LoRA of the head": honoured,
        "LoRA of one expert": honoured,
        "LoRA of stacked experts": honoured,
        "LoRA taken for experts": honoured,
        "LoRA of a turned weight": honoured,
        "LoRA of a convolution": refused(_NOT, "drop"),
        "LoRA on a changed base": refused(_NOT, "lora"),
        "DoRA": honoured,
        "other kind": refused(_NOT, "lora"),
        "bias of a LoRA": refused(_NOT, "drop"),
        "trained bias": refused(_NOT, "drop"),
        "saved norm": refused(_NOT, "drop"),
        "saved head": refused(_NOT, "drop"),
        "saved module": refused(_NOT, "saved"),
        "saved vocabulary": refused(_NOT, "saved"),
        "carried weight": honoured,
        "added rows": refused(_NOT, "drop"),
        "token rows": refused(_NOT, "drop"),
        "virtual tokens": refused(_NOT),
        "pattern of targets": honoured,
        "no targets": honoured,
        "beyond the targets": honoured,
        "missing fields": honoured,
        "bias setting": honoured,
        "promised modules": honoured,
        "null patterns": honoured,
        "block-diagonal factors": honoured,
        "bare names": honoured,
        "wrapped names": honoured,
        "doubled prefix": honoured,
        "names of an adapter": honoured,
        "targeted parameters": honoured,
        "added tokens": honoured,  # not looked at
        "pickled weights": refused("it opens adapters.safetensors", "rewrite"),
        "other weight files": honoured,
    },
)
