# SPDX-License-Identifier: Apache-2.0
"""Sana: Nvidia's release (diffusers 0.42.1, ``convert_sana_transformer_to_diffusers``)."""

from __future__ import annotations

from collections.abc import Iterator

from surgery_formats.models.layouts.rule import Network, Rule, fused, same

__all__ = ["NETWORK"]

_IN, _OUT = "blocks.#.", "transformer_blocks.#."
_TIME = "time_embed."


def _block() -> Iterator[Rule]:
    yield fused(f"{_IN}attn.qkv", *(f"{_OUT}attn1.{part}" for part in ("to_q", "to_k", "to_v")))
    yield same(f"{_IN}attn.proj", f"{_OUT}attn1.to_out.0")
    yield same(f"{_IN}cross_attn.q_linear", f"{_OUT}attn2.to_q")
    yield fused(f"{_IN}cross_attn.kv_linear", f"{_OUT}attn2.to_k", f"{_OUT}attn2.to_v")
    yield same(f"{_IN}cross_attn.proj", f"{_OUT}attn2.to_out.0")
    for old, new in (("inverted_conv", "conv_inverted"), ("depth_conv", "conv_depth"), ("point_conv", "conv_point")):
        yield same(f"{_IN}mlp.{old}.conv", f"{_OUT}ff.{new}")
    yield same(f"{_IN}scale_shift_table", f"{_OUT}scale_shift_table")


_RULES = (
    *_block(),
    same("x_embedder.proj", "patch_embed.proj"),
    same("t_embedder.mlp.0", f"{_TIME}emb.timestep_embedder.linear_1"),
    same("t_embedder.mlp.2", f"{_TIME}emb.timestep_embedder.linear_2"),
    same("t_block.1", f"{_TIME}linear"),
    *(same(f"y_embedder.y_proj.fc{number}", f"caption_projection.linear_{number}") for number in (1, 2)),
    same("attention_y_norm", "caption_norm"),
    same("final_layer.linear", "proj_out"),
    same("final_layer.scale_shift_table", "scale_shift_table"),
)

NETWORK = Network("Sana", ("SanaTransformer2DModel",), (lambda _: _RULES,))
