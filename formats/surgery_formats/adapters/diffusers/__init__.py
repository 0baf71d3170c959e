# SPDX-License-Identifier: Apache-2.0
"""LoRA files of diffusers: one file for all components, dotted names behind ``unet.``, ``transformer.``, ``text_encoder.``."""

from __future__ import annotations

from surgery_formats.adapters.grammar.dialect import Dialect
from surgery_formats.adapters.grammar.format import WeightFileFormat
from surgery_formats.adapters.grammar.leaves import LORA_SPELLINGS
from surgery_formats.adapters.grammar.spelling import DOTTED

__all__ = ["DIFFUSERS"]

_PREFIXES = tuple(prefix for prefix in DOTTED if prefix.component != "denoiser")
_DOWN, _UP = LORA_SPELLINGS["lora_A"]

DIFFUSERS = WeightFileFormat(
    Dialect(
        name="diffusers",
        prefixes=_PREFIXES,
        own=tuple(prefix.text for prefix in _PREFIXES),
        written={"": "transformer.", **{prefix.component: prefix.text for prefix in _PREFIXES}},
        leaves={
            "down": _DOWN,
            "up": _UP,
            "dora_scale": "lora_magnitude_vector",
            "up_bias": "lora_B.bias",
            "whole_weight": "weight",
        },
        with_alpha=False,
        in_header=True,
        names_of="diffusers",
        norms=(".norm_q.", ".norm_k.", ".norm_added_q.", ".norm_added_k."),  # of control LoRAs of Flux
        loaded=frozenset(["LoRA", "DoRA"]),
    ),
    title="diffusers file (and ai-toolkit, SimpleTuner): unet., transformer., text_encoder., alphas in the header",
    file_stems=("pytorch_lora_weights",),
)
