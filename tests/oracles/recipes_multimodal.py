# SPDX-License-Identifier: Apache-2.0
"""Decoders that read images too: of each, an export takes the language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.oracles.recipes_fields import GEMMA, GQA, Case

__all__ = ["MULTIMODAL"]

_IMAGES = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_IMAGES_QWEN = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 20, "patch_size": 4}


def _sees(name: str, text: Mapping[str, Any], images: Mapping[str, Any], **fields: Any) -> Case:
    own = {"text_config": text, "vision_config": images, "eos_token_id": None}
    return Case(f"{name}ForConditionalGeneration", f"{name}Config", {**own, **fields})


MULTIMODAL: dict[str, Case] = {
    "llava": _sees("Llava", {**GQA, "model_type": "llama"}, {**_IMAGES, "model_type": "clip_vision_model"}),
    "gemma3_images": _sees(
        "Gemma3",
        {**GEMMA, "sliding_window": 5, "sliding_window_pattern": 3},
        {**_IMAGES, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
    ),
    "qwen2_vl": _sees(
        "Qwen2VL",
        {**GQA, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [1, 1, 2]}},
        {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
    ),
    "qwen2_5_vl": _sees(
        "Qwen2_5_VL",
        {**GQA, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [1, 1, 2]}},
        {**_IMAGES_QWEN, "out_hidden_size": 32, "fullatt_block_indexes": [0]},
        tie_word_embeddings=True,
    ),
    "qwen3_vl": _sees(
        "Qwen3VL",
        {
            **GQA,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 500.0,
                "mrope_section": [3, 3, 2],
                "mrope_interleaved": True,
            },
        },
        {**_IMAGES_QWEN, "out_hidden_size": 32, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    ),
    "mistral3": _sees(
        "Mistral3",
        {**GQA, "model_type": "mistral", "sliding_window": 5},
        {**_IMAGES, "model_type": "pixtral", "head_dim": 8},
        tie_word_embeddings=False,
    ),
    "internvl": _sees(
        "InternVL",
        {**GQA, "model_type": "qwen2"},
        {**_IMAGES, "image_size": [8, 8], "patch_size": [4, 4]},
        tie_word_embeddings=False,
    ),
    "llava_next": _sees("LlavaNext", {**GQA, "model_type": "llama"}, {**_IMAGES, "model_type": "clip_vision_model"}),
    "idefics3": _sees("Idefics3", {**GQA, "model_type": "llama"}, _IMAGES),
    "smolvlm": _sees("SmolVLM", {**GQA, "model_type": "llama"}, _IMAGES, tie_word_embeddings=True),
}
