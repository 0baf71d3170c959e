# SPDX-License-Identifier: Apache-2.0
"""How the keys of kohya's files begin, and the component that each beginning stands for."""

from __future__ import annotations

__all__ = ["PREFIXES"]

PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
