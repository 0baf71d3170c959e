# SPDX-License-Identifier: Apache-2.0
"""Flux 2: the release of Black Forest Labs (diffusers 0.42.1, ``convert_flux2_transformer_checkpoint_to_diffusers``)."""

from __future__ import annotations

from surgery_formats.models.layouts.flux import SAVED_NORMS
from surgery_formats.models.layouts.rule import Network, fused, same, swapped

__all__ = ["NETWORK"]

_IN, _OUT = "double_blocks.#.", "transformer_blocks.#."
_SINGLE_IN, _SINGLE_OUT = "single_blocks.#.", "single_transformer_blocks.#."
_RULES = (
    fused(f"{_IN}img_attn.qkv", *(f"{_OUT}attn.{x}" for x in ("to_q", "to_k", "to_v"))),
    fused(f"{_IN}txt_attn.qkv", *(f"{_OUT}attn.{x}" for x in ("add_q_proj", "add_k_proj", "add_v_proj"))),
    same(f"{_IN}img_attn.norm.query_norm.scale", f"{_OUT}attn.norm_q.weight"),
    same(f"{_IN}img_attn.norm.key_norm.scale", f"{_OUT}attn.norm_k.weight"),
    same(f"{_IN}txt_attn.norm.query_norm.scale", f"{_OUT}attn.norm_added_q.weight"),
    same(f"{_IN}txt_attn.norm.key_norm.scale", f"{_OUT}attn.norm_added_k.weight"),
    same(f"{_IN}img_attn.proj", f"{_OUT}attn.to_out.0"),
    same(f"{_IN}txt_attn.proj", f"{_OUT}attn.to_add_out"),
    same(f"{_IN}img_mlp.0", f"{_OUT}ff.linear_in"),
    same(f"{_IN}img_mlp.2", f"{_OUT}ff.linear_out"),
    same(f"{_IN}txt_mlp.0", f"{_OUT}ff_context.linear_in"),
    same(f"{_IN}txt_mlp.2", f"{_OUT}ff_context.linear_out"),
    same(f"{_SINGLE_IN}linear1", f"{_SINGLE_OUT}attn.to_qkv_mlp_proj"),
    same(f"{_SINGLE_IN}linear2", f"{_SINGLE_OUT}attn.to_out"),
    same(f"{_SINGLE_IN}norm.query_norm.scale", f"{_SINGLE_OUT}attn.norm_q.weight"),
    same(f"{_SINGLE_IN}norm.key_norm.scale", f"{_SINGLE_OUT}attn.norm_k.weight"),
    same("img_in", "x_embedder"),
    same("txt_in", "context_embedder"),
    same("time_in.in_layer", "time_guidance_embed.timestep_embedder.linear_1"),
    same("time_in.out_layer", "time_guidance_embed.timestep_embedder.linear_2"),
    same("guidance_in.in_layer", "time_guidance_embed.guidance_embedder.linear_1"),
    same("guidance_in.out_layer", "time_guidance_embed.guidance_embedder.linear_2"),
    same("double_stream_modulation_img.lin", "double_stream_modulation_img.linear"),
    same("double_stream_modulation_txt.lin", "double_stream_modulation_txt.linear"),
    same("single_stream_modulation.lin", "single_stream_modulation.linear"),
    swapped("final_layer.adaLN_modulation.1", "norm_out.linear"),
    same("final_layer.linear", "proj_out"),
    *SAVED_NORMS,
)

NETWORK = Network("Flux 2", ("Flux2Transformer2DModel",), (lambda _: _RULES,))
