# SPDX-License-Identifier: Apache-2.0
"""What stands behind a module in a key: leaves, each with its role, in the spellings of every program.

Sources: diffusers 0.42 (``loaders/lora_conversion_utils.py``), ComfyUI (``comfy/lora.py``, ``weight_adapter``),
LyCORIS 4.1.3, sd-scripts (``networks``), PEFT 0.21.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["ENCODERS", "LEAVES", "LORA_SPELLINGS", "NORMS_OF_FLUX", "NOT_READ", "longest_leaf"]

LORA_SPELLINGS: Mapping[str, tuple[str, str]] = {
    "lora_down": ("lora_down.weight", "lora_up.weight"),
    "lora_A": ("lora_A.weight", "lora_B.weight"),
    "lora_A.default": ("lora_A.default.weight", "lora_B.default.weight"),
    "lora_A, bare": ("lora_A", "lora_B"),
    "lora.down": ("lora.down.weight", "lora.up.weight"),
    "lora_linear_layer": ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
}
"""Spellings of the two factors of a LoRA, of which a file has one."""

ENCODERS: Mapping[str, str] = {
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "t5": "text_encoder_3",
    "llama": "text_encoder_4",
    "gemma": "text_encoder",
    "qwen": "text_encoder",
    "emb_params": "text_encoder",
    "string_to_param.*": "text_encoder",
}
"""Components by what a bundle of embeddings calls their text encoders: OneTrainer's names, then those of A1111's files."""

_AS_THEY_ARE = (
    *("alpha", "dora_scale"),
    *(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    *("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"),
    *("weight", "on_input"),
    *("oft_blocks", "rescale"),
    *("diff", "diff_b", "diff_m", "w_norm", "b_norm", "set_weight"),
    *("reshape_weight", "scale"),
)

LEAVES: Mapping[str, str] = {
    **{spelling: role for pair in LORA_SPELLINGS.values() for role, spelling in zip(("down", "up"), pair, strict=True)},
    "lora_mid.weight": "mid",
    "lora_B.bias": "up_bias",
    "lora_B.default.bias": "up_bias",
    "lora_magnitude_vector": "dora_scale",
    "lora_magnitude_vector.weight": "dora_scale",
    "lora_magnitude_vector.default.weight": "dora_scale",
    **{leaf: leaf for leaf in _AS_THEY_ARE},
    "oft_R.weight": "oft_R.weight",
    "oft_R.scaled_oft": "oft_R.scaled_oft",
    "down.weight": "down",
    "up.weight": "up",
    **dict.fromkeys(ENCODERS, "embedding"),
    **{f"{leaf}_out": "embedding_out" for leaf in ENCODERS},
}
"""The role of every leaf by its spelling; most roles are called as they are spelt."""

NOT_READ: Mapping[str, str] = {
    "q_layer.weight": "T-LoRA",
    "p_layer.weight": "T-LoRA",
    "lambda_layer": "T-LoRA",
    "bias_indices": "a sparse bias",
    "bias_values": "a sparse bias",
    "bias_size": "a sparse bias",
    "lokr_t1": "LoKr with a core in its first factor",
}
"""Leaves that are known and not read, with what they are."""

_ELSEWHERE = {"down.weight", "up.weight", *(leaf for leaf, role in LEAVES.items() if role.startswith("embedding"))}
"""Leaves behind processors and in bundles, which `spelling` takes apart: anywhere else they are a module's own."""
_KNOWN = tuple(sorted({*LEAVES, *NOT_READ} - _ELSEWHERE, key=len, reverse=True))


NORMS_OF_FLUX = (".query_norm", ".key_norm")
"""Modules whose weight is called ``scale`` in every published file, and ``weight`` in ComfyUI's code."""


def longest_leaf(name: str) -> str:
    """The leaf that a dotted key ends with, the longest that is known; empty if none is."""
    return next((leaf for leaf in _KNOWN if name.endswith(leaf) and name[: -len(leaf)].endswith(".")), "")
