# SPDX-License-Identifier: Apache-2.0
"""OpenCLIP's text encoder, as single files of Stable Diffusion 2 and XL hold it; the other names are transformers'.

The rules of diffusers 0.42.1 (``convert_open_clip_checkpoint``). transformers 5 leaves ``text_model.`` out.
"""

from __future__ import annotations

from surgery_formats.models.layouts.rule import Network, Piece, Rule, fused, same

__all__ = ["NETWORK"]

_IN, _OUT = "transformer.resblocks.#.", "text_model.encoder.layers.#."
_ATTENTION = ("q_proj", "k_proj", "v_proj")
_RULES = (
    *(
        fused(f"{_IN}attn.in_proj_{leaf}", *(f"{_OUT}self_attn.{part}.{leaf}" for part in _ATTENTION))
        for leaf in ("weight", "bias")
    ),
    same(f"{_IN}attn.out_proj", f"{_OUT}self_attn.out_proj"),
    same(f"{_IN}mlp.c_fc", f"{_OUT}mlp.fc1"),
    same(f"{_IN}mlp.c_proj", f"{_OUT}mlp.fc2"),
    same(f"{_IN}ln_1", f"{_OUT}layer_norm1"),
    same(f"{_IN}ln_2", f"{_OUT}layer_norm2"),
    same("token_embedding", "text_model.embeddings.token_embedding"),
    same("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    same("ln_final", "text_model.final_layer_norm"),
    Rule("text_projection", (Piece("text_projection.weight"),), transposed=True),
)
_WITHOUT_PREFIX = tuple(
    same(piece.name.removeprefix("text_model."), piece.name)
    for rule in _RULES
    for piece in rule.pieces
    if piece.name.startswith("text_model.")
)

NETWORK = Network(
    "CLIP",
    ("clip", "clip_text_model", "clip_text_model_with_projection"),
    (lambda _: _RULES, lambda _: _WITHOUT_PREFIX),
    denoises=False,
)
