# SPDX-License-Identifier: Apache-2.0
"""Qwen-Image and its editing models: every program uses diffusers' names; ComfyUI puts its prefix in front."""

from __future__ import annotations

from surgery_formats.models.layouts.rule import Network, same

__all__ = ["NETWORK"]

_BLOCK = "transformer_blocks.#"
_ATTENTION = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("norm_q", "norm_k", "norm_added_q", "norm_added_k"),
)
_NAMES = (
    *(f"{_BLOCK}.attn.{name}" for name in _ATTENTION),
    *(f"{_BLOCK}.{side}_{name}" for side in ("img", "txt") for name in ("mlp.net.0.proj", "mlp.net.2", "mod.1")),
    *("img_in", "txt_in", "txt_norm", "norm_out.linear", "proj_out"),
    *(f"time_text_embed.timestep_embedder.linear_{number}" for number in (1, 2)),
)
_RULES = tuple(same(name, name) for name in _NAMES)

NETWORK = Network("Qwen-Image", ("QwenImageTransformer2DModel",), (lambda _: _RULES,))
