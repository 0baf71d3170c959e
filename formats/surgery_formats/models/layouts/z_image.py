# SPDX-License-Identifier: Apache-2.0
"""Z-Image: ComfyUI's file (diffusers 0.42.1, ``convert_z_image_transformer_checkpoint_to_diffusers``)."""

from __future__ import annotations

from collections.abc import Iterator

from surgery_formats.models.layouts.rule import Network, Rule, fused, same

__all__ = ["NETWORK"]

_ALIKE = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0")
_NORMS = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")


def _block(at: str) -> Iterator[Rule]:
    yield fused(f"{at}.attention.qkv", *(f"{at}.attention.{part}" for part in ("to_q", "to_k", "to_v")))
    yield same(f"{at}.attention.out", f"{at}.attention.to_out.0")
    yield same(f"{at}.attention.q_norm", f"{at}.attention.norm_q")
    yield same(f"{at}.attention.k_norm", f"{at}.attention.norm_k")
    yield from (same(f"{at}.{name}", f"{at}.{name}") for name in (*_ALIKE, *_NORMS))


_RULES = (
    *_block("layers.#"),
    *_block("noise_refiner.#"),
    *_block("context_refiner.#"),
    same("x_embedder", "all_x_embedder.2-1"),
    same("final_layer.linear", "all_final_layer.2-1.linear"),
    same("final_layer.adaLN_modulation.1", "all_final_layer.2-1.adaLN_modulation.1"),
    *(same(name, name) for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.0", "cap_embedder.1")),
    *(same(name, name) for name in ("x_pad_token", "cap_pad_token")),
)

NETWORK = Network("Z-Image", ("ZImageTransformer2DModel",), (lambda _: _RULES,))
