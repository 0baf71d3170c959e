# SPDX-License-Identifier: Apache-2.0
"""Chroma: Flux whose modulations come from one small network (diffusers 0.42.1's conversion)."""

from __future__ import annotations

from surgery_formats.models.layouts.flux import BLOCKS
from surgery_formats.models.layouts.rule import Network, same

__all__ = ["NETWORK"]

_GUIDANCE = "distilled_guidance_layer"
_RULES = (
    *BLOCKS,
    same("txt_in", "context_embedder"),
    same(f"{_GUIDANCE}.in_proj", f"{_GUIDANCE}.in_proj"),
    same(f"{_GUIDANCE}.out_proj", f"{_GUIDANCE}.out_proj"),
    same(f"{_GUIDANCE}.layers.#.in_layer", f"{_GUIDANCE}.layers.#.linear_1"),
    same(f"{_GUIDANCE}.layers.#.out_layer", f"{_GUIDANCE}.layers.#.linear_2"),
    same(f"{_GUIDANCE}.norms.#.scale", f"{_GUIDANCE}.norms.#.weight"),
)

NETWORK = Network("Chroma", ("ChromaTransformer2DModel",), (lambda _: _RULES,), in_omi={"img_in": "img_in.proj"})
