# SPDX-License-Identifier: Apache-2.0
"""Files with the dotted names of modules and nothing before them: DiffSynth-Studio, the Lightning LoRAs of Qwen-Image.

Others that are read so: control LoRAs of Black Forest Labs, XLabs' processors of Flux, and LoRAs of diffusion networks behind
PEFT's ``base_model.model.`` without its configuration (fal, HunyuanDiT, PixArt), which every program takes at a scale of 1.
"""

from __future__ import annotations

from surgery_formats.adapters.grammar.dialect import Dialect
from surgery_formats.adapters.grammar.format import WeightFileFormat
from surgery_formats.adapters.grammar.leaves import LORA_SPELLINGS
from surgery_formats.adapters.grammar.spelling import KeyPrefix

__all__ = ["BARE"]

_PEFT = "base_model.model."
_DOWN, _UP = LORA_SPELLINGS["lora_down"]

BARE = WeightFileFormat(
    Dialect(
        name="bare",
        prefixes=(KeyPrefix(_PEFT, "denoiser", False), KeyPrefix("", "", False)),
        denoising=(_PEFT,),  # others are PEFT's, without the configuration that has its scale
        written={"": "", "denoiser": ""},
        leaves={"down": _DOWN, "up": _UP},
    ),
    title="dotted names without a prefix (DiffSynth-Studio, Lightning, XLabs, BFL, fal): LoRA, LyCORIS' kinds, differences",
)
