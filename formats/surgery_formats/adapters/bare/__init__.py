# SPDX-License-Identifier: Apache-2.0
"""Files with the dotted names of modules and nothing before them: DiffSynth-Studio, the Lightning LoRAs of Qwen-Image.

Others that are read so: control LoRAs of Black Forest Labs, XLabs' processors of Flux, and fal's LoRAs of Flux, behind PEFT's
``base_model.model.`` without its configuration, which every program takes at a scale of 1.
"""

from __future__ import annotations

from surgery_formats.adapters.grammar.dialect import Dialect
from surgery_formats.adapters.grammar.format import WeightFileFormat
from surgery_formats.adapters.grammar.leaves import LORA_SPELLINGS
from surgery_formats.adapters.grammar.spelling import DOTTED, OF_FLUX, KeyPrefix

__all__ = ["BARE"]

_DOWN, _UP = LORA_SPELLINGS["lora_down"]

BARE = WeightFileFormat(
    Dialect(
        name="bare",
        prefixes=(KeyPrefix("base_model.model.", "denoiser", False), KeyPrefix("", "", False)),
        # of PEFT, without the configuration that has its scale; and of diffusers, which is what such a file is taken for
        foreign=("base_model.", *(prefix.text for prefix in DOTTED)),
        but=OF_FLUX,
        written={"": "", "denoiser": ""},
        leaves={"down": _DOWN, "up": _UP, "whole_scale": "scale"},
    ),
    title="dotted names without a prefix (DiffSynth-Studio, Lightning, XLabs, BFL, fal): LoRA, LyCORIS' kinds, differences",
)
