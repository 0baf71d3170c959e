# SPDX-License-Identifier: Apache-2.0
"""Files with the original names of a diffusion network behind ``diffusion_model.``: ComfyUI, ai-toolkit, diffusion-pipe.

A file may hold LoRA, LyCORIS' kinds and differences side by side (LightX2V).
"""

from __future__ import annotations

from surgery_formats.adapters.grammar.dialect import Dialect
from surgery_formats.adapters.grammar.format import WeightFileFormat
from surgery_formats.adapters.grammar.leaves import LORA_SPELLINGS
from surgery_formats.adapters.grammar.spelling import FLAT, KeyPrefix

__all__ = ["COMFYUI"]

_MODEL = KeyPrefix("diffusion_model.", "denoiser", False)
_ENCODERS = {
    "text_encoder_2": ("clip_g",),
    "text_encoder_3": ("t5xxl", "umt5xxl", "old_t5xxl", "pile_t5xl"),  # of whatever number a base has it
    "text_encoder": ("*",),  # clip_l, and of most networks the only one: qwen3_06b, gemma2_2b, llama ...
}
_TEXT = tuple(
    KeyPrefix(f"text_encoders.{name}.transformer.", component, False)
    for component, names in _ENCODERS.items()
    for name in names
)
_DOWN, _UP = LORA_SPELLINGS["lora_A"]

COMFYUI = WeightFileFormat(
    Dialect(
        name="comfyui",
        prefixes=(_MODEL, *_TEXT, *(prefix for prefix in FLAT if prefix.component.startswith("text_encoder"))),
        own=(_MODEL.text, "text_encoders."),
        written={"": _MODEL.text, _MODEL.component: _MODEL.text},
        leaves={"down": _DOWN, "up": _UP},
        encoders={
            "*": "text_encoders.*.transformer.",
            "clip_text_model:text_encoder": "text_encoders.clip_l.transformer.",
            "clip_text_model:text_encoder_2": "text_encoders.clip_g.transformer.",
            "t5": "text_encoders.t5xxl.transformer.",
            "umt5": "text_encoders.umt5xxl.transformer.",
        },
        whole=True,
        in_release=True,
    ),
    title="ComfyUI file (and ai-toolkit, diffusion-pipe, LightX2V): original names behind diffusion_model.",
)
