# SPDX-License-Identifier: Apache-2.0
"""Llama and the many decoders that keep its names."""

from surgery_formats.families.family import Family

__all__ = ["FAMILY"]

FAMILY = Family(
    names=(
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "olmo",
        "olmo2",
        "granite",
        "smollm3",
        "stablelm",
        "cohere",
        "starcoder2",
        "phi",
    ),
    embedding="model.embed_tokens",
    head="lm_head",
)
