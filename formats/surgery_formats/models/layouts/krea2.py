# SPDX-License-Identifier: Apache-2.0
"""Krea 2: the release and ComfyUI's file of it (diffusers 0.42.1, ``convert_krea2_transformer_checkpoint_to_diffusers``)."""

from __future__ import annotations

from collections.abc import Iterator

from surgery_formats.models.layouts.rule import Network, Rule, same

__all__ = ["NETWORK"]

_BLOCKS = {
    "blocks.#.": "transformer_blocks.#.",
    "txtfusion.layerwise_blocks.#.": "text_fusion.layerwise_blocks.#.",
    "txtfusion.refiner_blocks.#.": "text_fusion.refiner_blocks.#.",
}
_MODULES = {"wq": "to_q", "wk": "to_k", "wv": "to_v", "wo": "to_out.0", "gate": "to_gate"}
_SCALES = {
    "attn.qknorm.qnorm": "attn.norm_q",
    "attn.qknorm.knorm": "attn.norm_k",
    "prenorm": "norm1",
    "postnorm": "norm2",
}


def _block(old: str, new: str) -> Iterator[Rule]:
    yield from (same(f"{old}attn.{a}", f"{new}attn.{b}") for a, b in _MODULES.items())
    yield from (same(f"{old}mlp.{name}", f"{new}ff.{name}") for name in ("gate", "up", "down"))
    yield from (same(f"{old}{a}.scale", f"{new}{b}.weight") for a, b in _SCALES.items())
    yield same(f"{old}mod.lin", f"{new}scale_shift_table")


_RULES = (
    *(rule for old, new in _BLOCKS.items() for rule in _block(old, new)),
    same("first", "img_in"),
    same("tmlp.0", "time_embed.linear_1"),
    same("tmlp.2", "time_embed.linear_2"),
    same("tproj.1", "time_mod_proj"),
    same("txtmlp.0.scale", "txt_in.norm.weight"),
    same("txtmlp.1", "txt_in.linear_1"),
    same("txtmlp.3", "txt_in.linear_2"),
    same("txtfusion.projector", "text_fusion.projector"),
    same("last.linear", "final_layer.linear"),
    same("last.norm.scale", "final_layer.norm.weight"),
    same("last.modulation.lin", "final_layer.scale_shift_table"),
)

NETWORK = Network("Krea 2", ("Krea2Transformer2DModel",), (lambda _: _RULES,))
