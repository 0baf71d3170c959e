# SPDX-License-Identifier: Apache-2.0
"""Qwen-Image, its editing models, and 2.1.

Every program uses diffusers' names; ComfyUI puts its prefix in front, and stores gate and up of 2.1 as one (diffusers
0.42.1, ``convert_qwen_image21_transformer_checkpoint_to_diffusers``).
"""

from __future__ import annotations

from surgery_formats.models.layouts.rule import Network, fused, same

__all__ = ["NETWORK", "NETWORK_21"]

_BLOCK = "transformer_blocks.#"
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k")
_OF_TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_q", "norm_added_k")
_TIME = tuple(f"time_text_embed.timestep_embedder.linear_{number}" for number in (1, 2))
_NAMES = (
    *(f"{_BLOCK}.attn.{name}" for name in (*_ATTENTION, *_OF_TEXT)),
    *(f"{_BLOCK}.{side}_{name}" for side in ("img", "txt") for name in ("mlp.net.0.proj", "mlp.net.2", "mod.1")),
    *("img_in", "txt_in", "txt_norm", "norm_out.linear", "proj_out", *_TIME),
)
_NAMES_21 = (
    *(f"{_BLOCK}.attn.{name}" for name in _ATTENTION),
    *(f"{_BLOCK}.img_mlp.out", "modulation.#", "img_in", "norm_out.linear", "proj_out", *_TIME),
    *(f"txt_in.{name}" for name in ("in_layer", "out_layer", "text_norm")),
)
_MLP = f"{_BLOCK}.img_mlp"

_RULES = tuple(same(name, name) for name in _NAMES)
_RULES_21 = (
    *(same(name, name) for name in _NAMES_21),
    fused(f"{_MLP}.gate_up", f"{_MLP}.gate_layer", f"{_MLP}.proj"),
)

NETWORK = Network("Qwen-Image", ("QwenImageTransformer2DModel",), (lambda _: _RULES,))
NETWORK_21 = Network("Qwen-Image 2.1", ("QwenImage21Transformer2DModel",), (lambda _: _RULES_21,))
