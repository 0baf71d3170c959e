# SPDX-License-Identifier: Apache-2.0
"""Which modules AdapterHub's library wraps as LoRAs, and by which switch of the configuration (adapters 1.3.0, ``models/*/mixin_*.py``)."""

from __future__ import annotations

import re
from typing import Literal

__all__ = ["Place", "layer_of", "place_of"]

Place = Literal["q", "k", "v", "qkv", "intermediate", "output", ""]
"""A matrix of the attention, or the switch ``intermediate_lora`` or ``output_lora``; empty for a module that is never wrapped."""

_PLACES: tuple[tuple[str, Place], ...] = (
    (
        r"(.*\.)?(attention\.self\.query|attention\.attention\.query|q_proj|q_lin|SelfAttention\.q|EncDecAttention\.q)",
        "q",
    ),
    (r"(.*\.)?(attention\.self\.key|attention\.attention\.key|k_proj|k_lin|SelfAttention\.k|EncDecAttention\.k)", "k"),
    (
        r"(.*\.)?(attention\.self\.value|attention\.attention\.value|v_proj|v_lin|SelfAttention\.v|EncDecAttention\.v)",
        "v",
    ),
    (r"(.*\.)?(attn\.c_attn|attention\.self\.in_proj)", "qkv"),
    (r".*\.mlp\.down_proj", "intermediate"),  # Llama and Mistral: the library has the two the other way round
    (r".*\.mlp\.up_proj", "output"),
    (r".*\.(intermediate\.dense|ffn\.lin1|mlp\.(c_fc|fc_in|fc1)|fc1|DenseReluDense\.wi(_1)?|ffn)", "intermediate"),
    (r".*\.(\d+\.output\.dense|ffn\.lin2|mlp\.(c_proj|fc_out|fc2)|fc2|DenseReluDense\.wo|ffn_output)", "output"),
)


def place_of(module: str) -> Place:
    """The place of a module, by its path."""
    return next((place for pattern, place in _PLACES if re.fullmatch(pattern, module)), "")


def layer_of(module: str) -> int | None:
    """The number of its layer; None outside of layers."""
    number = re.search(r"(?:^|\.)([0-9]{1,9})(?:\.|$)", module)
    return None if number is None else int(number[1])
