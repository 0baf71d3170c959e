# SPDX-License-Identifier: Apache-2.0
"""Flux: the release of Black Forest Labs, which sd-scripts and ComfyUI follow (flux1-dev.safetensors).

The rules of diffusers 0.42.1 (``convert_flux_transformer_checkpoint_to_diffusers``).
"""

from __future__ import annotations

from surgery_formats.models.layouts.rule import Network, Rule, fused, same, swapped

__all__ = ["BLOCKS", "NETWORK", "SAVED_NORMS"]

_IN, _OUT = "double_blocks.#.", "transformer_blocks.#."
_SINGLE_IN, _SINGLE_OUT = "single_blocks.#.", "single_transformer_blocks.#."
_TIME = "time_text_embed."

_NORMS = (
    (f"{_IN}img_attn.norm.query_norm", f"{_OUT}attn.norm_q.weight"),
    (f"{_IN}img_attn.norm.key_norm", f"{_OUT}attn.norm_k.weight"),
    (f"{_IN}txt_attn.norm.query_norm", f"{_OUT}attn.norm_added_q.weight"),
    (f"{_IN}txt_attn.norm.key_norm", f"{_OUT}attn.norm_added_k.weight"),
    (f"{_SINGLE_IN}norm.query_norm", f"{_SINGLE_OUT}attn.norm_q.weight"),
    (f"{_SINGLE_IN}norm.key_norm", f"{_SINGLE_OUT}attn.norm_k.weight"),
)

SAVED_NORMS: tuple[Rule, ...] = tuple(
    same(f"{old}norm.{name}_norm", f"{new}attn.norm_{added}{name[0]}")
    for old, new, added in (
        (f"{_IN}img_attn.", _OUT, ""),
        (f"{_IN}txt_attn.", _OUT, "added_"),
        (_SINGLE_IN, _SINGLE_OUT, ""),
    )
    for name in ("query", "key")
)
"""ComfyUI calls the scale of a norm its weight, and saves it so."""

BLOCKS: tuple[Rule, ...] = (
    fused(f"{_IN}img_attn.qkv", *(f"{_OUT}attn.{x}" for x in ("to_q", "to_k", "to_v"))),
    fused(f"{_IN}txt_attn.qkv", *(f"{_OUT}attn.{x}" for x in ("add_q_proj", "add_k_proj", "add_v_proj"))),
    *(
        same(f"{ours}.{leaf}", theirs) for ours, theirs in _NORMS for leaf in ("scale", "weight")
    ),  # ComfyUI's code: weight
    same(f"{_IN}img_attn.proj", f"{_OUT}attn.to_out.0"),
    same(f"{_IN}txt_attn.proj", f"{_OUT}attn.to_add_out"),
    same(f"{_IN}img_mlp.0", f"{_OUT}ff.net.0.proj"),
    same(f"{_IN}img_mlp.2", f"{_OUT}ff.net.2"),
    same(f"{_IN}txt_mlp.0", f"{_OUT}ff_context.net.0.proj"),
    same(f"{_IN}txt_mlp.2", f"{_OUT}ff_context.net.2"),
    fused(
        f"{_SINGLE_IN}linear1",
        *(f"{_SINGLE_OUT}{x}" for x in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
        units=(1, 1, 1, 4),
    ),
    fused(
        f"{_SINGLE_IN}linear1_qkv", *(f"{_SINGLE_OUT}attn.{x}" for x in ("to_q", "to_k", "to_v"))
    ),  # XLabs', ComfyUI's
    same(f"{_SINGLE_IN}linear2", f"{_SINGLE_OUT}proj_out"),
    same("img_in", "x_embedder"),
    same("final_layer.linear", "proj_out"),
    *SAVED_NORMS,
)
"""What Chroma has too."""

MODULATED: tuple[Rule, ...] = (
    same(f"{_IN}img_mod.lin", f"{_OUT}norm1.linear"),
    same(f"{_IN}txt_mod.lin", f"{_OUT}norm1_context.linear"),
    same(f"{_SINGLE_IN}modulation.lin", f"{_SINGLE_OUT}norm.linear"),
    same("time_in.in_layer", f"{_TIME}timestep_embedder.linear_1"),
    same("time_in.out_layer", f"{_TIME}timestep_embedder.linear_2"),
    same("vector_in.in_layer", f"{_TIME}text_embedder.linear_1"),
    same("vector_in.out_layer", f"{_TIME}text_embedder.linear_2"),
    same("guidance_in.in_layer", f"{_TIME}guidance_embedder.linear_1"),
    same("guidance_in.out_layer", f"{_TIME}guidance_embedder.linear_2"),
    swapped("final_layer.adaLN_modulation.1", "norm_out.linear"),
)
"""What HunyuanVideo has too."""

_RULES = (*BLOCKS, *MODULATED, same("txt_in", "context_embedder"))

NETWORK = Network("Flux", ("FluxTransformer2DModel",), (lambda _: _RULES,), in_omi={"img_in": "img_in.proj"})
