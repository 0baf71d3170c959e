# SPDX-License-Identifier: Apache-2.0
"""Encoders of images, and the towers of text beside them."""

from __future__ import annotations

from tests.oracles.recipes_fields import VOCAB, Case

__all__ = ["IMAGES", "TOWERS"]

_IMAGE = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 3,
}
_TEXT_TOWER = {**{key: _IMAGE[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}}
_TEXT_TOWER |= {"num_attention_heads": 4, "vocab_size": VOCAB, "max_position_embeddings": 16, "projection_dim": 12}
_SIGLIP_TEXT = {key: value for key, value in _TEXT_TOWER.items() if key != "projection_dim"}

IMAGES: dict[str, Case] = {
    "vit_classifier": Case("ViTForImageClassification", "ViTConfig", _IMAGE),
    "vit_bare": Case("ViTModel", "ViTConfig", {**_IMAGE, "qkv_bias": False, "pooler_output_size": 20}),
    "vit_wide": Case("ViTForImageClassification", "ViTConfig", {**_IMAGE, "image_size": [8, 16], "patch_size": [4, 8]}),
    "dinov2_classifier": Case("Dinov2ForImageClassification", "Dinov2Config", {**_IMAGE, "mlp_ratio": 2}),
    "dinov2_bare_swiglu": Case("Dinov2Model", "Dinov2Config", {**_IMAGE, "mlp_ratio": 2, "use_swiglu_ffn": True}),
    "dinov2_registers": Case(
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", {**_IMAGE, "mlp_ratio": 2}
    ),
    "clip_vision": Case("CLIPVisionModel", "CLIPVisionConfig", _IMAGE),
    "clip_vision_projected": Case(
        "CLIPVisionModelWithProjection", "CLIPVisionConfig", {**_IMAGE, "projection_dim": 12}
    ),
    "clip_classifier": Case(
        "CLIPForImageClassification",
        "CLIPConfig",
        {"vision_config": _IMAGE, "text_config": _TEXT_TOWER, "num_labels": 5},
    ),
    "siglip_vision": Case("SiglipVisionModel", "SiglipVisionConfig", _IMAGE),
    "siglip_classifier": Case(
        "SiglipForImageClassification", "SiglipConfig", {"vision_config": _IMAGE, "text_config": _SIGLIP_TEXT}
    ),
}
TOWERS: dict[str, Case] = {
    "clip_text": Case("CLIPTextModel", "CLIPTextConfig", {**_TEXT_TOWER, "eos_token_id": 7}),
    "clip_text_projected": Case("CLIPTextModelWithProjection", "CLIPTextConfig", {**_TEXT_TOWER, "eos_token_id": 7}),
    "clip_text_old_end": Case("CLIPTextModelWithProjection", "CLIPTextConfig", {**_TEXT_TOWER, "eos_token_id": 2}),
    "siglip_text": Case("SiglipTextModel", "SiglipTextConfig", {**_SIGLIP_TEXT, "projection_size": 20}),
}
