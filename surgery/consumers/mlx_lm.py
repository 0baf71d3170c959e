# SPDX-License-Identifier: Apache-2.0
"""mlx-lm: folders of its own format, with one rank and one scale; it refuses what is no adapter's parameter."""

from __future__ import annotations

from surgery.consumers.consumer import RuledConsumer, SourceRead
from surgery.consumers.rules import honoured, refused
from surgery.consumers.starts import NO_FOLDERS, lora_alone

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
        **NO_FOLDERS,
        **lora_alone(refused, _NOT),
        "LoRA of a convolution": refused(_NOT, "drop"),
        "LoRA on a changed base": refused(_NOT, "lora"),
        "DoRA": honoured,
    },
)
